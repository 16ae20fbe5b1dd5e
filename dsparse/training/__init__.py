"""Fine-tuning: `python train.py` and `dsparse train` are `main`.

config.py: every option. data.py: rows of tokens. loss.py, step.py: one update. checkpoint.py: saved states.
metrics.py: what is reported. loop.py: all of it together.
"""

from dsparse.training.config import TrainConfig
from dsparse.training.loop import main, train
from dsparse.training.step import make_train_step

__all__ = ["TrainConfig", "main", "make_train_step", "train"]
