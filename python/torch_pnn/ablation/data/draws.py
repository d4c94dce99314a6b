"""Random numbers that hang on a seed, an epoch and an image's place alone: whoever asks for them, in whatever order.

They come from Philox 4×64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), which is a function
from a key and a counter to bits: no state is carried from one image to the next, so a resumed run, another batch size
or several threads change nothing.
"""

from __future__ import annotations

import numpy as np

#: What the numbers are for; each has a stream of its own.
ORDER, AUGMENTATION, SPLIT = 1, 2, 3
_WORDS_PER_BLOCK = 4


def bits(seed: int, epoch: int, purpose: int, first: int, images: int, words: int) -> np.ndarray:
    """64-bit words for some images that follow each other.

    Args:
        seed: not negative.
        epoch: not negative.
        purpose: a stream: ORDER, AUGMENTATION or SPLIT.
        first: the place of the first image.
        images: how many images.
        words: how many numbers each has.

    Returns:
        uint64 [images, words].

    Example:
        >>> every = bits(3, 1, ORDER, 0, 10, 5)
        >>> bool((bits(3, 1, ORDER, 7, 2, 5) == every[7:9]).all())
        True
    """
    blocks = -(-words // _WORDS_PER_BLOCK)
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([first * blocks, 0, 0, purpose], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(images * blocks * _WORDS_PER_BLOCK)
    return raw.reshape(images, blocks * _WORDS_PER_BLOCK)[:, :words]


def uniforms(words: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) with 53 bits from words.

    Example:
        >>> uniforms(np.array([0, 1 << 63], dtype=np.uint64))
        array([0. , 0.5])
    """
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, count: int, purpose: int = ORDER) -> np.ndarray:
    """0 … count - 1 in an order that hangs on seed, epoch and purpose.

    Returns:
        int64 [count].

    Example:
        >>> sorted(permutation(0, 0, 5).tolist())
        [0, 1, 2, 3, 4]
    """
    return np.argsort(bits(seed, epoch, purpose, 0, count, 1)[:, 0], kind="stable")
