"""What the HTTP side of every server backend shares; knows no engine.

`wire` carries options and records through an engine as plain bytes and text, `replies` puts records into the
OpenAI-compatible JSON and its streams.
"""
