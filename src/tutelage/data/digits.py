# SPDX-License-Identifier: Apache-2.0
"""Real handwritten digits that come with scikit-learn: nothing to download.

Reference: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

import torch

from tutelage.data.samples import Arrays, class_words, stratified, without

#: Seed of the split, apart from any run's: all runs see the same validation images.
SPLIT_SEED = 1797
VALIDATION = 600


def digits() -> tuple[Arrays, Arrays]:
    """Return the training (1,197) and validation (600) images, `[1, 8, 8]` float in [0, 1].

    The split is stratified and always the same.

    Example:
        >>> train, validation = digits()
        >>> len(train), len(validation), train.read(0).shape
        (1197, 600, torch.Size([1, 8, 8]))
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 16.0
    targets = torch.as_tensor(found.target, dtype=torch.int64)
    whole = Arrays(images, targets, class_words(range(10)), "digits")
    held_out = stratified(targets, VALIDATION, SPLIT_SEED)
    return whole.keep(without(len(whole), held_out)), whole.keep(held_out)
