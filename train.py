"""Fine-tune a checkpoint: `python train.py --model FOLDER --data FILE ...` (`--help` lists every option)."""

import sys

from dsparse.training import main

if __name__ == "__main__":
    sys.exit(main())
