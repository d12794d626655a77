"""The command line: from a table to a run, to samples, scores, a student and a page."""

import csv
import gzip
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pyroflows as pf
from pyroflows.cli import app, fitting, page, runs
from pyroflows.cli import columns as cols
from pyroflows.cli.outliers import lowest_by_chance, outliers_by_chance
from pyroflows.cli.tables import Table, read_table, write_table

SMALL = ["--layers", "1", "--hidden", "8", "--epochs", "2"]


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def ok(*args):
    done = run(*args)
    assert done.exit_code == 0, done.output
    return done


def fails(*args):
    """The one line of an error."""
    done = run(*args)
    assert done.exit_code == 2, done.output
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.output
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return errors[0]


def write_csv(path, names, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if names:
            writer.writerow(names)
        writer.writerows(rows)
    return path


def rows_of(count=300):
    generator = np.random.default_rng(0)
    z = generator.normal(size=(count, 2))
    income = np.exp(0.5 * z[:, 0])
    share = 1 / (1 + np.exp(-(z[:, 0] + z[:, 1])))
    return np.column_stack([income, 100 + 10 * z[:, 1], share])


NAMES = ["Einkommen (€)", "size, m2", "share"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A small run of a small table with a missing cell and a column of words."""
    folder = tmp_path_factory.mktemp("cli")
    rows = [[*map(repr, row.tolist()), "here"] for row in rows_of()]
    rows[5][1], rows[9][2] = "", "NA"
    data = write_csv(folder / "data.csv", [*NAMES, "place"], rows)
    out = folder / "run"
    options = ["--positive", NAMES[0], "--bounded", "share=0:1", "--flow", "maf", *SMALL]
    done = ok("fit", data, "--out", out, *options, "--json")
    return data, out, json.loads(done.stdout)


def test_fit_reports_rows_columns_and_held_out_nats(fitted):
    _, out, said = fitted
    assert said["columns"] == NAMES
    assert said["left_out"] == ["place"]
    assert (said["rows"], said["used"]) == (300, 298)
    assert said["missing"] == {"size, m2": 1, "share": 1}
    assert said["held_out"]["rows"] == 30
    assert np.isfinite(said["held_out"]["nats"])
    flow = pf.load(out)
    assert flow.config["builder"] == "maf"
    assert flow.config["arguments"]["layers"] == 1
    held = np.load(out / "rows.npz")["held"]
    nats = flow.log_prob(torch.tensor(held, dtype=torch.float32)).mean().item()
    assert nats == pytest.approx(said["held_out"]["nats"], abs=1e-5)


def test_rows_far_outside_are_named_and_left_out_of_fit_and_score(tmp_path):
    values = rows_of()
    values[16, 1], values[200, 1], values[100, 0] = 1e30, -9999.0, 1e300
    cells = [[*map(repr, row.tolist())] for row in values]
    cells[3][0] = ""
    data = write_csv(tmp_path / "data.csv", NAMES, cells)
    done = ok("fit", data, "--out", tmp_path / "run", "--flow", "maf", *SMALL, "--json")
    said = json.loads(done.stdout)
    assert (said["rows"], said["used"], said["far_out"]) == (300, 296, 3)
    told = " ".join(done.stderr.split())
    assert "data.csv (rows counted from 1): 3 of 299 rows are far outside all others" in told
    assert "row 17 ('size, m2' is 1e+30, the others go from" in told
    assert "row 101 ('Einkommen (€)' is 1e+300" in told
    assert "row 201 ('size, m2' is -9999" in told
    assert abs(said["held_out"]["nats"]) < 100


def test_sample_has_the_names_and_units_of_the_table(fitted, tmp_path):
    _, out, _ = fitted
    ok("sample", out, "-n", 500, "--out", tmp_path / "x.csv", "--seed", 1)
    table = read_table(tmp_path / "x.csv")
    assert table.names == NAMES
    assert table.values.shape == (500, 3)
    assert (table.values[:, 0] > 0).all()
    assert ((table.values[:, 2] > 0) & (table.values[:, 2] < 1)).all()
    assert abs(np.median(table.values[:, 1]) - 100) < 10
    ok("sample", out, "-n", 500, "--out", tmp_path / "x.npy", "--seed", 1)
    assert np.array_equal(np.load(tmp_path / "x.npy"), table.values.astype(np.float32))
    printed = ok("sample", out, "-n", 3).stdout
    assert len(printed.splitlines()) == 4


def test_score_adds_a_column_and_counts_outliers(fitted, tmp_path):
    data, out, _ = fitted
    done = ok("score", out, data, "--out", tmp_path / "scored.csv", "--quantile", 0.1, "--json")
    said = json.loads(done.stdout)
    assert 15 < said["outliers"] < 50
    assert (said["rows"], said["unscored"]) == (300, 2)
    ok("score", out, data, "--quantile", 0.1, "--max-outliers", said["outliers"])
    too_many = run("score", out, data, "--quantile", 0.1, "--max-outliers", said["outliers"] - 1)
    assert too_many.exit_code == 1
    with open(data, newline="") as before, open(tmp_path / "scored.csv", newline="") as after:
        old, new = list(csv.reader(before)), list(csv.reader(after))
    assert [row[:-1] for row in new] == old
    assert new[0][-1] == "log_density"
    assert (new[6][-1], new[10][-1]) == ("", "")
    flow = pf.load(out)
    row = torch.tensor([[float(cell) for cell in old[1][:3]]])
    assert float(new[1][-1]) == pytest.approx(flow.log_prob(row).item(), abs=1e-4)


@pytest.mark.parametrize(("moved", "by", "code"), [(0, 0, 0), (1, 50, 0), (30, 50, 1), (1, 1e6, 1)])
def test_score_ends_with_1_where_chance_does_not_explain_the_outliers(
    fitted, tmp_path, moved, by, code
):
    rows = rows_of()
    rows[:moved, 1] += by  # in standard deviations a tenth of that
    table = write_csv(tmp_path / "moved.csv", NAMES, rows.tolist())
    done = run("score", fitted[1], table, "--json")
    assert done.exit_code == code
    assert moved - 5 < json.loads(done.stdout)["outliers"] <= moved


def test_rows_outside_the_support_score_nothing_else_does(fitted, tmp_path):
    _, out, _ = fitted
    rows = rows_of(4).tolist()
    expected = runs.read_run(out).scores(np.array(rows))
    rows[1][0], rows[2][2], rows[3][1] = -1.0, 1.5, 1e300
    data = write_csv(tmp_path / "odd.csv", ["x", *NAMES], [[0, *row] for row in rows])
    done = run("score", out, data, "--out", tmp_path / "s.npy", "--json")
    assert json.loads(done.stdout)["outliers"] >= 3
    scores = np.load(tmp_path / "s.npy")[:, -1]
    assert scores[0] == pytest.approx(expected[0], abs=1e-5)
    assert (scores[1:] == -np.inf).all()


def test_a_table_without_a_finite_row_scores_nothing(fitted, tmp_path):
    data = write_csv(tmp_path / "none.csv", NAMES, [["nan", *rows_of(1).tolist()[0][1:]]])
    ok("score", fitted[1], data, "--out", tmp_path / "s.npy")
    assert np.isnan(np.load(tmp_path / "s.npy")[:, -1]).all()


def test_scored_cells_may_hold_line_breaks(fitted, tmp_path):
    rows = [["two\rlines", *rows_of(2)[0]], ["a, b", *rows_of(2)[1]]]
    data = write_csv(tmp_path / "d.csv", ["note\r\nhere", *NAMES], rows)
    run("score", fitted[1], data, "--out", tmp_path / "s.csv")
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as file:
        cells = list(csv.reader(file))
    assert [row[0] for row in cells] == ["note\nhere", "two\nlines", "a, b"]
    assert read_table(tmp_path / "s.csv").names == ["note here", *NAMES, "log_density"]


def test_distill_keeps_columns_and_samples_fast(fitted, tmp_path):
    _, out, _ = fitted
    done = ok("distill", out, "--out", tmp_path / "fast", "--steps", 50, "--json")
    assert np.isfinite(json.loads(done.stdout)["reverse_kl"][0])
    assert pf.load(tmp_path / "fast").fast == "sample"
    ok("sample", tmp_path / "fast", "-n", 5, "--out", tmp_path / "x.csv")
    assert read_table(tmp_path / "x.csv").names == NAMES


def test_distill_learns_from_training_rows_and_is_judged_by_held_out_ones(
    fitted, tmp_path, monkeypatch
):
    given = {}
    true_distill, true_compare = fitting.distill_flow, fitting.compare

    def distilled(*args, **options):
        given.update(options)
        return true_distill(*args, **options)

    def compared(teacher, student, test, **options):
        given.update(test=test)
        return true_compare(teacher, student, test, **options)

    monkeypatch.setattr(fitting, "distill_flow", distilled)
    monkeypatch.setattr(fitting, "compare", compared)
    ok("distill", fitted[1], "--out", tmp_path / "fast", "--steps", 50)
    run_of = runs.read_run(fitted[1])
    torch.testing.assert_close(given["data"], run_of.tensor(run_of.train))
    torch.testing.assert_close(given["test"], run_of.tensor(run_of.test))
    ok("report", tmp_path / "fast", "--samples", 200)
    page = (tmp_path / "fast" / "report.html").read_text(encoding="utf-8")
    assert f"distilled from {run_of.flow.config['builder']}, which was fitted to" in page
    assert "KL divergences" in page


def test_pairs_show_as_many_samples_as_rows(fitted):
    from pyroflows.cli.page import _pairs

    made = runs.read_run(fitted[1])
    figure, _ = _pairs(made, np.repeat(made.test, 10, axis=0))
    shown = {len(dots.get_offsets()) for ax in figure.axes for dots in ax.collections}
    assert shown == {len(made.test)}


def test_errors_speak_of_the_command_line(tmp_path):
    assert "pyroflows fit" in fails("sample", tmp_path / "nowhere")
    data = write_csv(tmp_path / "one.csv", ["a"], [[x] for x in range(50)])
    assert "pf.maf or pf.iaf takes one" in fails("fit", data, "--out", tmp_path / "one")


def test_report_is_one_page_with_its_pictures(fitted, tmp_path):
    _, out, _ = fitted
    done = ok("report", out, "--out", tmp_path / "page.html", "--samples", 500)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 4
    assert "Einkommen (€)" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "held out: " in done.output
    assert "calibration" in done.output


def test_calibration_sees_right_and_wrong_densities(fitted):
    from pyroflows.cli.page import judged

    made = runs.read_run(fitted[1])
    made.test = made.flow.sample((1000,)).numpy()
    assert judged(made, 5000)["calibrated"]
    inner = made.flow.transform.inverse_and_log_det(torch.tensor(made.test))[0]
    wide = made.flow.transform.forward_and_log_det(1.3 * inner)[0]
    made.test = wide.detach().numpy()
    assert not judged(made, 5000)["calibrated"]


def test_names_are_text_in_the_page(tmp_path):
    names = ["<script>alert(1)</script>", "$\\frac{", "\u202e名前"]
    data = write_csv(tmp_path / "d.csv", names, rows_of(60).tolist())
    ok("fit", data, "--out", tmp_path / "run", "--flow", "nice", "--layers", "2", *SMALL[2:])
    ok("report", tmp_path / "run", "--samples", 200)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_list_shows_every_builder_and_its_costs():
    flows = json.loads(ok("list", "--json").stdout)["flows"]
    found = {(row["flow"], row["sample"], row["log_prob"]) for row in flows}
    assert {("maf", "1 solve", "1 pass"), ("iaf", "1 pass", "1 solve")} <= found
    assert ("nsf", "1 pass", "1 pass") in found
    assert {row["flow"] for row in flows} == set(pf.flows.builders())
    assert "pass" in ok("list").output


def test_check_holds_a_module_to_the_contract(tmp_path, monkeypatch):
    (tmp_path / "flows_here.py").write_text(
        "import torch, pyroflows as pf\n"
        "def good(features):\n    return pf.nice(features, layers=2, hidden=(8,))\n"
        "class Wrong(pf.transforms.LULinear):\n"
        "    def forward_and_log_det(self, x, context=None):\n"
        "        y, log_det = super().forward_and_log_det(x, context)\n"
        "        return y, log_det + 1\n"
        "def bad():\n    return pf.Flow(Wrong(2), shape=2)\n"
        "def none():\n    return 3\n"
        "def raises():\n    raise RuntimeError('no luck')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    done = run("check", "flows_here:bad", "--json")
    said = json.loads(done.stdout)
    assert done.exit_code == 1
    assert "log_det" in said["broken"]
    assert "repr" in said["held"]
    assert "expected a Flow from it, got int" in fails("check", "flows_here:none")
    assert "no luck" in fails("check", "flows_here:raises")
    assert "cannot find 'flows_here:absent'" in fails("check", "flows_here:absent")
    assert "expected module:function" in fails("check", "flows_here")


@pytest.mark.slow
def test_check_passes_a_right_flow(tmp_path, monkeypatch):
    (tmp_path / "right_flows.py").write_text(
        "import pyroflows as pf\n"
        "def good(features):\n    return pf.nice(features, layers=2, hidden=(8,))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "laws hold" in ok("check", "right_flows:good").output


@pytest.mark.parametrize(
    "command", ["fit", "sample", "score", "distill", "report", "list", "check"]
)
def test_help_explains_every_command(command):
    done = ok(command, "--help")
    assert f"Example: pyroflows {command}" in " ".join(done.output.split())


def test_errors_are_one_line_and_code_2(fitted, tmp_path):
    data, out, _ = fitted
    new = tmp_path / "new"
    assert "no such file" in fails("fit", tmp_path / "none.csv", "--out", new)
    assert "'glowing' is unknown" in fails("fit", data, "--out", new, "--flow", "glowing")
    assert "makes images" in fails("fit", data, "--out", new, "--flow", "glow")
    wavenet = fails("fit", data, "--out", new, "--flow", "wavenet", "--hidden", "8")
    assert "--hidden: wavenet has no such size" in wavenet
    assert "is not empty" in fails("fit", data, "--out", out)
    assert "did you mean 'share'" in fails("fit", data, "--out", new, "--columns", "shar")
    place = fails("fit", data, "--out", new, "--columns", "share,place")
    assert "column 'place' has 300 cells that are no numbers ('here' in line 2)" in place
    assert "not inside (0, 1)" in fails("fit", data, "--out", new, "--bounded", "size, m2=0:1")
    assert "NAME=LOW:HIGH" in fails("fit", data, "--out", new, "--bounded", "share=zero")
    refused = fails("fit", data, "--out", new, "--missing", "refuse")
    assert "2 rows have missing or infinite values, in columns 'size, m2', 'share'; corr" in refused
    assert "'drop' or 'refuse'" in fails("fit", data, "--out", new, "--missing", "impute")
    assert "--hidden" in fails("fit", data, "--out", new, "--hidden", "wide")
    assert "pf.save" in fails("sample", tmp_path)
    assert "--quantile" in fails("score", out, data, "--quantile", 2)
    assert "is the table itself" in fails("score", out, data, "--out", data)
    assert "expected a file named" in fails("sample", out, "--out", tmp_path / "x.xlsx")
    failed = run("sample", tmp_path, "--json", "--out", tmp_path / "x.csv")
    assert failed.exit_code == 2
    assert "pf.save" in json.loads(failed.stdout)["error"]
    assert "cannot be made" in fails("fit", data, "--out", data / "within")
    assert not new.exists(), "a run that fails leaves nothing"


def test_a_wrong_option_is_code_2(fitted):
    assert run("sample", fitted[1], "-n", "0").exit_code == 2
    assert run("sample", fitted[1], "--colour", "red").exit_code == 2


def test_an_unexpected_error_is_one_line_too(fitted, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(runs, "load", broken)
    assert fails("sample", fitted[1]) == (
        "error: unexpected ZeroDivisionError: oh no (PYROFLOWS_TRACEBACK=1 shows where)"
    )
    monkeypatch.setenv("PYROFLOWS_TRACEBACK", "1")
    assert isinstance(run("sample", fitted[1]).exception, ZeroDivisionError)


@pytest.fixture(scope="module")
def other(fitted, tmp_path_factory):
    """A run of the same table, from other seeds: its files would fit into the first."""
    data, _, _ = fitted
    out = tmp_path_factory.mktemp("other") / "run"
    options = ["--positive", NAMES[0], "--bounded", "share=0:1", "--flow", "maf", *SMALL]
    ok("fit", data, "--out", out, *options, "--seed", 1)
    return out


def one_bit(path, _other):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def one_number(path, other):
    """A number changed by someone who knows the format; the checksum is not put right."""
    if path.suffix == ".json":
        text = path.read_text(encoding="utf-8")
        place = re.search(r"\d", text[len(text) // 2 :]).start() + len(text) // 2
        changed = f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}"
        path.write_text(changed, encoding="utf-8")
    elif path.suffix == ".npz":
        with np.load(path) as rows:
            np.savez_compressed(path, train=rows["train"] * np.nan, held=rows["held"])
    else:
        content = bytearray(path.read_bytes())
        content[-4:] = np.float32(3.0).tobytes()
        path.write_bytes(content)


DAMAGE = {
    "bit": one_bit,
    "number": one_number,
    "half": lambda path, _other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path, _other: path.write_bytes(b""),
    "gone": lambda path, _other: path.unlink(),
    "other": lambda path, other: path.write_bytes((other / path.name).read_bytes()),
}
FILES = ("config.json", "model.safetensors", "rows.npz", "table.json")


@pytest.mark.parametrize("command", ["sample", "score", "report", "distill"])
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_file_of_a_run_is_refused_by_name(fitted, other, tmp_path, command, damage):
    data, out, _ = fitted
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".html") == list(FILES)
    options = {"score": [data], "distill": ["--out", tmp_path / "new"]}.get(command, [])
    for name in FILES:
        broken = tmp_path / name / "run"
        shutil.copytree(out, broken)
        DAMAGE[damage](broken / name, other)
        error = fails(command, broken, *options)
        assert str(broken) in error or name in error, error
        assert not (tmp_path / "new").exists()


def test_tables_of_every_kind_are_the_same(tmp_path):
    rows = rows_of(20)
    write_table(tmp_path / "a.csv", NAMES, [rows])
    write_table(tmp_path / "a.tsv", NAMES, [rows])
    write_table(tmp_path / "a.csv.gz", NAMES, [rows])
    write_table(tmp_path / "a.npy", NAMES, [rows])
    fields = np.rec.fromarrays(rows.T, names=["a", "b", "c"])
    np.save(tmp_path / "b.npy", fields)
    (tmp_path / "semicolons.csv").write_text(
        "\ufeffa;b;c\n" + "\n".join(";".join(map(repr, r)) for r in rows.tolist())
    )
    write_csv(tmp_path / "bare.csv", None, rows.tolist())
    for name in ("a.csv", "a.tsv", "a.csv.gz", "a.npy", "b.npy", "semicolons.csv", "bare.csv"):
        table = read_table(tmp_path / name)
        assert np.array_equal(table.values, rows), name
    assert read_table(tmp_path / "semicolons.csv").names == ["a", "b", "c"]
    assert read_table(tmp_path / "bare.csv").names == ["column_1", "column_2", "column_3"]
    assert len(read_table(tmp_path / "bare.csv", header=True).values) == 19
    with gzip.open(tmp_path / "a.csv.gz", "rt", encoding="utf-8") as file:
        assert file.readline().startswith("Ein")


IRIS = "5.1,3.5,setosa\n4.9,3.0,setosa\n7.0,3.2,versicolor\n"


@pytest.mark.parametrize(
    ("content", "names", "rows"),
    [
        (IRIS, None, 3),  # words, but all the way
        ("x,y,kind\n" + IRIS, ["x", "y", "kind"], 3),
        ("x,2,kind\n" + IRIS, ["x", "2", "kind"], 3),
        (",a\n0,1\n1,2\n", ["column_1", "a"], 2),
        ("a,b\n,2\nNA,3\n", ["a", "b"], 2),
        ("#,%\n1,2\n", ["#", "%"], 1),
        ("1,-,3\n4,5,6\n", None, 2),  # a mark is no name
        ("1_000,2\n3,4\n", None, 2),
        ("1,?,3\n4,5,6\n", None, 2),
        ("5.1,3.5,setosa\n", None, 1),
        ("a\n1\n2\n", ["a"], 2),
    ],
)
def test_the_first_line_has_names_where_words_stand_above_numbers(content, names, rows, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    table = read_table(tmp_path / "t.csv")
    assert table.header is (names is not None)
    assert table.names == (names or [f"column_{i + 1}" for i in range(len(table.names))])
    assert len(table.values) == rows


@pytest.mark.parametrize(
    ("content", "names", "first"),
    [
        ("1,5;2,5;3,5\n4,5;5,5;6,5\n", None, [np.nan] * 3),
        ("\na;b\n1;2\n3;4\n", ["a", "b"], [1, 2]),
        ("a;b\n1,5;2\n3,5;4\n", ["a", "b"], [np.nan, 2]),
        ('a,"b; c"\n1,2\n', ["a", "b; c"], [1, 2]),
        ('"a;b;c",d\n"1\n",2\n', ["a;b;c", "d"], [1, 2]),
        ("a\tb, in m\n1\t2\n", ["a", "b, in m"], [1, 2]),
        ("n,text\n1," + "x" * 150_000 + "\n", None, "not a CSV"),
        (",".join(["1"] * 100_000) + "\n", None, [1] * 100_000),
    ],
)
def test_the_separator_cuts_all_lines_alike(content, names, first, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    if isinstance(first, str):
        with pytest.raises(ValueError, match=first):
            read_table(tmp_path / "t.csv")
        return
    table = read_table(tmp_path / "t.csv")
    assert table.names == (names or [f"column_{i + 1}" for i in range(len(first))])
    assert np.array_equal(table.values[0], first, equal_nan=True)


def test_fit_says_what_it_took_the_first_line_for(tmp_path):
    rows = [[*row, "here"] for row in rows_of(60).tolist()]
    small = ["--flow", "nice", "--layers", "2", *SMALL[2:]]
    bare = ok("fit", write_csv(tmp_path / "b.csv", None, rows), "--out", tmp_path / "b", *small)
    assert "60 rows, 60 of them usable" in bare.output
    assert "no names in the first line: 'column_1', 'column_2' and 2 more" in bare.output
    data = write_csv(tmp_path / "n.csv", [*NAMES, "place"], rows)
    named = ok("fit", data, "--out", tmp_path / "n", *small)
    assert "names in the first line: 'Einkommen (€)', " in named.output
    assert "first line" not in ok("fit", data, "--header", "--out", tmp_path / "h", *small).output
    (tmp_path / "c.csv").write_text("a;b\n" + "1,5;2,5\n" * 30)
    line = fails("fit", tmp_path / "c.csv", "--out", tmp_path / "c")
    assert "no column of numbers, '1,5' in line 2 is none; decimals have a point" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found none"),
        (b"a,b\n", "found none"),
        (b"a,b\n1,2\n3\n", "line 3 has 1 cells, the first one 2"),
        (b"a,a\n1,2\n", "two columns are named 'a'"),
        (b"a\n\xff\xfe\n", "not UTF-8"),
        (b"a,b\n" + b"x" * 200_000 + b",1\n", "not a CSV"),
    ],
)
def test_tables_that_are_none(content, message, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_arrays_that_are_no_tables(tmp_path):
    path = tmp_path / "t.npy"
    for bad in (np.array([{}]), np.zeros((2, 2, 2)), np.zeros(3, complex), np.array(["a"])):
        np.save(path, bad, allow_pickle=True)
        with pytest.raises(ValueError, match=r"t\.npy"):
            read_table(path)
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"t\.npy"):
        read_table(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    line = fails("fit", tmp_path / "t.parquet", "--out", tmp_path / "run")
    assert "pip install 'pyroflows[parquet]'" in line


def test_cells_are_read_as_what_they_are(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,c\n1,NA, 2.5 \n1_000,?,-inf\n3,null,1e400\n")
    table = read_table(path)
    assert table.words == {"a": (1, "'1_000' in line 3")}
    assert np.isnan(table.values[:, 1]).all()
    assert table.values[:, 2].tolist() == [2.5, -np.inf, np.inf]


def test_columns_without_a_density_are_refused():
    rows = rows_of(50)
    real = dict.fromkeys(NAMES)
    assert cols.check_values(rows, real) == []
    for column, message in (
        (np.full(50, 3.0), "'share' is 3 in every row"),
        (rows[:, 2] * 1e300, "more than the arithmetic"),
        (rows[:, 2] * 1e-300, "more than the arithmetic"),
        (1e12 + rows[:, 2], "more than the arithmetic"),
    ):
        changed = np.column_stack([rows[:, :2], column])
        with pytest.raises(ValueError, match=message):
            cols.check_values(changed, real)
    few = np.column_stack([rows[:, :2], rows[:, 2] > 0.5])
    assert "2 different values" in cols.check_values(few, real)[0]
    with pytest.raises(ValueError, match="at least 20 usable rows"):
        cols.check_values(rows[:5], real)


def test_bounds_name_one_column():
    assert cols.bounds_of(["a=b", "c, d"], [], ["a=b=0:1", "c, d=2:3"]) == {
        "a=b": (0.0, 1.0),
        "c, d": (2.0, 3.0),
    }
    for option, message in (
        ("a,b=0:1", "no column 'a,b'"),
        ("=0:1", "no column ''"),
        ("0:1", "expected NAME=LOW:HIGH, got '0:1'"),
    ):
        with pytest.raises(ValueError, match=message):
            cols.bounds_of(["a", "b"], [], [option])


def test_a_run_finds_its_columns_by_their_whole_names(tmp_path):
    made = runs.Run(tmp_path, None, {"columns": ["a,b"], "header": True}, None, None)
    with pytest.raises(ValueError, match="no column 'a,b'"):
        runs.matched(made, Table(["a", "b"], np.zeros((2, 2)), True))


def test_a_table_is_written_where_it_was_asked_for(tmp_path):
    write_table(tmp_path / "x.NPY", ["a"], [np.ones((2, 1))])
    assert [path.name for path in tmp_path.iterdir()] == ["x.NPY"]
    assert len(read_table(tmp_path / "x.NPY").values) == 2
    with pytest.raises(ValueError, match="expected a file named"):
        write_table(tmp_path / "x.npy.gz", ["a"], [np.ones((2, 1))])


def test_precision_follows_the_columns():
    rows = rows_of(50)
    real = dict.fromkeys(NAMES)
    assert cols.dtype_for(rows, real) == "float32"
    assert cols.dtype_for(rows + 1e6, real) == "float64"
    bounds = {**real, "share": (0.0, 1.0)}
    rows[0, 2] = 1 - 1e-12
    assert cols.dtype_for(rows, bounds) == "float64"


def test_python_m_runs_it():
    done = subprocess.run(
        [sys.executable, "-m", "pyroflows", "--help"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert "distill" in done.stdout


@pytest.mark.parametrize(("below", "known", "rows"), [(0, 10, 500), (2, 2000, 10_000), (3, 60, 30)])
def test_chance_explains_outliers_99_times_in_a_hundred(below, known, rows):
    rng = np.random.default_rng(0)
    share = rng.beta(below + 1, known - below, 200_000)
    allowed = outliers_by_chance(rows, below, known)
    counts = rng.binomial(rows, share)
    assert (counts > allowed).mean() < 0.012
    assert (counts > allowed - 1).mean() > 0.008


@pytest.mark.parametrize("tail", ["gaussian", "cauchy"])
@pytest.mark.parametrize(("known", "rows"), [(100, 10_000), (300, 300)])
def test_a_row_is_far_out_by_chance_less_than_once_in_a_hundred_tables(tail, known, rows):
    rng = np.random.default_rng(0)

    def scores(count):
        if tail == "gaussian":
            return -rng.chisquare(5, count) / 2
        return -np.log1p(rng.standard_cauchy(count) ** 2)

    alarms = [scores(rows).min() < lowest_by_chance(scores(known), rows) for _ in range(1000)]
    assert np.mean(alarms) < 0.012
    assert lowest_by_chance(scores(known), rows) > -150  # a wrong row is still seen


def test_check_takes_a_flow_and_leaves_it_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "made_flows.py").write_text(
        "import pyroflows as pf\n"
        "mine = pf.realnvp(2, layers=1, hidden=(8,))\n"
        "bare = pf.Flow(pf.transforms.Permute([1, 0]), shape=(2,))\n"
        "frozen = pf.maf(2, layers=1, hidden=(8,))\n"
        "next(frozen.parameters()).requires_grad_(False)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import made_flows

    before = {k: v.clone() for k, v in made_flows.mine.state_dict().items()}
    for name in ("mine", "bare", "frozen"):
        said = json.loads(run("check", f"made_flows:{name}", "--json").stdout)
        # A permutation alone does copy features.
        assert list(said["broken"]) == (["every_feature_moves"] if name == "bare" else [])
        assert {"state", "gradients", "large_weights", "memory_of_draws"} <= set(said["held"])
    for key, value in made_flows.mine.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_killed_overwrite_is_no_run(fitted, tmp_path, monkeypatch):
    made = runs.read_run(fitted[1])
    made.folder = tmp_path
    made.write()
    monkeypatch.setattr(runs, "write_atomically", None)
    with pytest.raises(TypeError):
        made.write()
    with pytest.raises(ValueError, match="expected a folder that pyroflows fit wrote"):
        runs.read_run(tmp_path)


def test_a_report_leaves_out_draws_that_are_not_finite(fitted, tmp_path, monkeypatch):
    made = runs.read_run(fitted[1])
    made.train[:, 1] = made.train[0, 1]
    sample = made.flow.sample
    calls = []

    def broken(shape):
        rows = sample(shape)
        if not calls:
            rows[0] = torch.inf
        calls.append(shape)
        return rows

    monkeypatch.setattr(made.flow, "sample", broken)
    assert len(np.concatenate(list(made.draws(1)))) == 1  # the first draw was infinite
    calls.clear()
    facts = page.judged(made, 100)
    assert facts["draws"].shape == (100, 3)
    assert np.isfinite(facts["draws"]).all()
    assert np.isfinite(facts["gaussian"])
    monkeypatch.setattr(made.flow, "sample", lambda shape: sample(shape) * torch.nan)
    with pytest.raises(ValueError, match="samples are not finite"):
        list(made.draws(10))
