"""Sheets of pictures hold every picture where it belongs."""

import pytest
import torch

import pyroflows as pf


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_holds_each_picture_in_its_row_and_column(channels):
    pictures = torch.randint(17, (2, 3, channels, 4, 5))
    sheet = pf.plots.sheet(pictures, bins=17)
    assert sheet.shape == (2 * 5 + 1, 3 * 6 + 1, channels)
    for row in range(2):
        for column in range(3):
            cell = sheet[5 * row + 1 : 5 * row + 5, 6 * column + 1 : 6 * column + 6]
            assert cell.permute(2, 0, 1).allclose(pictures[row, column] / 16)


@pytest.mark.parametrize("count", [1, 4])
def test_saves_all_panels(count, tmp_path):
    path = tmp_path / "new" / "sheets.png"
    pf.plots.save_sheets({f"{k}": torch.zeros(1, 2, 3, 4, 4) for k in range(count)}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 2, 2, 4, 4)])
def test_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="rows, columns"):
        pf.plots.sheet(torch.zeros(shape))


def test_refuses_no_panels(tmp_path):
    with pytest.raises(ValueError, match="panels"):
        pf.plots.save_sheets({}, tmp_path / "none.png")
