"""What the operating system and Python itself ask for: addresses, forks, signals, files from strangers, the switch."""
