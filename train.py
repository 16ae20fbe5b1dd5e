"""Fine-tune a checkpoint: `python train.py --model FOLDER --data FILE ...` (`--help` lists every option)."""

import sys

from dsparse.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
