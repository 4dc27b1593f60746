"""What is made of captured attention: zones, probes, maps and comparisons over records and fingerprints."""
