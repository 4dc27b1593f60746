"""What knows nothing of attention: addresses, forks, signals, files from strangers, the switch, old names."""
