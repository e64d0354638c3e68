"""Scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels that ship with the package."""

from pathlib import Path

import torch

from bayesq.suite.datasets.base import DataSplits, Examples, SeededSplits


class Digits(SeededSplits):
    """The digits, split by a seed."""

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
        origin = f"scikit-learn {sklearn.__version__} load_digits"
        return self.cut(whole, 10, {"origin": origin, "sha256": whole.checksum()})
