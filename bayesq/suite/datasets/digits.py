"""Scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels that ship with the package."""

from pathlib import Path

import torch

from bayesq.suite.datasets.base import DataSplits, Examples, seeded_splits


class Digits:
    """The digits, split by a seed.

    Args:
        split_seed: seed of the shuffle that assigns examples to splits.
        calibration_pool: number of examples calibration sets are drawn from.
        evaluation: number of evaluation examples; what remains is the train split.
        limit: keep only the first `limit` evaluation examples.
    """

    def __init__(self, split_seed: int, calibration_pool: int, evaluation: int, limit: int | None = None) -> None:
        self.split_seed = split_seed
        self.calibration_pool = calibration_pool
        self.evaluation = evaluation
        self.limit = limit

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with inputs [n, 1, 8, 8] in [0, 1]; `cache_dir` stays untouched.

        Raises:
            UserError: the split sizes do not fit the 1,797 examples.
        """
        import sklearn
        from sklearn.datasets import load_digits

        digits = load_digits()
        whole = Examples(
            inputs=torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16,  # grey levels are 0..16
            labels=torch.tensor(digits.target, dtype=torch.int64),
            ids=[str(row) for row in range(len(digits.target))],
        )
        train, pool, evaluation = seeded_splits(
            whole,
            evaluation=self.evaluation,
            calibration_pool=self.calibration_pool,
            split_seed=self.split_seed,
            limit=self.limit,
        )
        source = {
            "origin": f"scikit-learn {sklearn.__version__} load_digits",
            "sha256": whole.checksum(),
            "split_seed": str(self.split_seed),
        }
        return DataSplits(train, pool, evaluation, num_classes=10, primary_metric="accuracy", source=source)
