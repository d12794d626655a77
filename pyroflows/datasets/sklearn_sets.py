"""Real data sets that come with scikit-learn and need no file.

The rows are the measured features; class labels and regression targets are left
out, because the sets serve density estimation. All but ``digits`` come in their
raw units: apply ``standardize`` where a model wants unit scale.
"""

from __future__ import annotations

import torch

from pyroflows.datasets.split import Split, resolved_dtype, seeded, shuffled_split


def digits(*, dequantize: bool = True, seed: int = 0, dtype: torch.dtype | None = None) -> Split:
    """Handwritten digits of 8 x 8 pixels with 17 grey levels, 1,797 rows.

    With ``dequantize`` each level ``k`` in 0..16 becomes ``(k + u) / 17``, where
    ``u`` is uniform on [0, 1), so that the values lie in [0, 1) and have a density.
    Without it the levels 0..16 are returned as they are.

    Source: the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin
    and C. Kaynak, UCI Machine Learning Repository), as shipped with scikit-learn.
    Licence: CC BY 4.0.

    Args:
        dequantize: whether to add uniform noise and rescale to the unit interval.
        seed: fixes the noise and the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 64)``: 1,439 training, 179 validation and 179 test.

    Raises:
        TypeError: if ``dtype`` is not floating-point.

    Example:
        >>> digits().train.shape
        torch.Size([1439, 64])
    """
    from sklearn.datasets import load_digits

    dtype = resolved_dtype(dtype)
    generator = seeded(seed)
    rows = torch.from_numpy(load_digits().data)
    if dequantize:
        noise = torch.rand(rows.shape, generator=generator, dtype=rows.dtype)
        # Rounding to a narrower type could otherwise reach 1, where a logit is infinite.
        rows = ((rows + noise) / 17).clamp(max=1 - torch.finfo(dtype).eps)
    return shuffled_split(rows.to(dtype), generator)


def breast_cancer(*, seed: int = 0, dtype: torch.dtype | None = None) -> Split:
    """Shape and texture of cell nuclei in 569 breast tumours, 30 raw features.

    Source: "Breast Cancer Wisconsin (Diagnostic)" (W. Wolberg, O. Mangasarian, N. Street
    and W. Street, UCI Machine Learning Repository), as shipped with scikit-learn.
    Licence: CC BY 4.0.

    Args:
        seed: fixes the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 30)``: 457 training, 56 validation and 56 test.

    Raises:
        TypeError: if ``dtype`` is not floating-point.

    Example:
        >>> breast_cancer().test.shape
        torch.Size([56, 30])
    """
    from sklearn.datasets import load_breast_cancer

    rows = torch.from_numpy(load_breast_cancer().data).to(resolved_dtype(dtype))
    return shuffled_split(rows, seeded(seed))


def wine(*, seed: int = 0, dtype: torch.dtype | None = None) -> Split:
    """Chemical analyses of 178 Italian wines, 13 raw features.

    Source: "Wine" (S. Aeberhard and M. Forina, UCI Machine Learning Repository), as
    shipped with scikit-learn.
    Licence: CC BY 4.0.

    Args:
        seed: fixes the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 13)``: 144 training, 17 validation and 17 test.

    Raises:
        TypeError: if ``dtype`` is not floating-point.

    Example:
        >>> wine().train.shape
        torch.Size([144, 13])
    """
    from sklearn.datasets import load_wine

    rows = torch.from_numpy(load_wine().data).to(resolved_dtype(dtype))
    return shuffled_split(rows, seeded(seed))


def diabetes(*, seed: int = 0, dtype: torch.dtype | None = None) -> Split:
    """Age, sex, body mass, blood pressure and six serum values of 442 patients.

    The features are in raw units; scikit-learn's own scaling would use the mean
    and spread of the test rows too. The second column, sex, takes two values only.

    Source: B. Efron, T. Hastie, I. Johnstone and R. Tibshirani, "Least Angle Regression"
    (2004), as shipped with scikit-learn.
    Licence: none stated by the authors; distributed by scikit-learn under BSD-3-Clause.

    Args:
        seed: fixes the shuffle.
        dtype: floating-point type of the result; torch's default if ``None``.

    Returns:
        Rows of shape ``(n, 10)``: 354 training, 44 validation and 44 test.

    Raises:
        TypeError: if ``dtype`` is not floating-point.

    Example:
        >>> diabetes().val.shape
        torch.Size([44, 10])
    """
    from sklearn.datasets import load_diabetes

    rows = torch.from_numpy(load_diabetes(scaled=False).data).to(resolved_dtype(dtype))
    return shuffled_split(rows, seeded(seed))
