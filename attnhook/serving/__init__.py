"""What the server backends share; knows no engine.

`step` captures the rows of one forward pass in a worker, `wire` carries options and records through an engine
as plain bytes and text, `replies` puts records into the OpenAI-compatible JSON and its streams.
"""
