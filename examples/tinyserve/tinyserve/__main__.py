"""``python -m tinyserve``."""

from tinyserve.server import main

if __name__ == "__main__":
    main()
