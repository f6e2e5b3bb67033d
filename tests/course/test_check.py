"""The course's exercises: the engine's own functions pass, and wrong answers are refused with a
line that says what is wrong."""

import json
import re
import textwrap

import numpy as np
import pytest

from flashinfer.cli.main import main
from flashinfer.course.chapters import LESSONS
from flashinfer.course.lesson import Wrong, loaded, task

NUMBERS = range(1, len(LESSONS) + 1)

# {chapter: [(an answer's body, what the line says of it)]}. `own` is the engine's function.
WRONG = {
    1: [
        ("return np.hstack([up, down.reshape(up.shape)])", "second half must be column 0 of down"),
        ("return np.hstack([down.T, up])", "first half must be row 0 of up"),
        ("return np.hstack([up.T, down])", "first half must be row 0 of up"),
        ("return np.hstack([up, down.T]).astype(np.float32)", "gave float32; the file holds"),
        ("return [list(row) for row in np.hstack([up, down.T])]", "is wanted: a row for each"),
        ("up[:] = 0; return np.hstack([up, down.T])", "first half must be row 0 of up"),
        ("return None", "gave None"),
        ("return up @ down", "row for each neuron|first half"),
        ("return undefined", "line 5: NameError"),
        ("raise SystemExit(3)", "line 5: SystemExit: 3, when called as bundle"),
    ],
    2: [
        ("return slot_of[neurons]", r"is wanted"),
        ("s, m, f, t, u = own(*a); return s, m[::-1], f, t, u", "misses must be"),
        ("s, m, f, t, u = own(*a); return s, m, t, f, u", "must stand in moved_from and moved_to"),
        ("s, m, f, t, u = own(*a); return s, m, f[:0], t[:0], u", "must stand in moved_from"),
        ("s, m, f, t, u = own(*a); last_used[s] = token - 1; return s, m, f, t, u",
         r"last_used\[\d+\] must be"),
        ("return own(neurons, token, None, *a[3:])", "has left the window and must not stay"),
        ("return own(neurons, token, window and 1, *a[3:])", "left although there was room"),
        ("return own(*a[:6], -priority, used)", "those of least priority must leave"),
        ("return own(*(x.copy() if isinstance(x, np.ndarray) else x for x in a))",
         "slot_of says|must hold neurons"),
        ("s, m, f, t, u = own(*a); return s, m, f, t, u + 1", "slots 0 to used - 1 must hold"),
        ("s, m, f, t, u = own(*a); return s + 0.5, m, f, t, u", "array of whole numbers"),
        ("s, m, f, t, u = own(*a); last_used[:u] = token; return s, m, f, t, u",
         "was last used by token|left the window"),
    ],
    3: [
        ("a, b, c = own(*a); return a, b, c - 1e3", "c must be large enough"),
        ("a, b, c = own(*a); return a, b, c + 1e4", "NO  neurons predicted a token"),
        ("a, b, c = own(*a); return a.T, b, c", "a must have the shape"),
        ("a, b, c = own(*a); return a, b, c * np.nan", "no finite numbers"),
        ("return own(*a)[:2]", r"\(a, b, c\) is wanted"),
        # One threshold for each neuron, by heart: right on this text, and wrong on others.
        ("a, b, c = own(*a); s = x @ a.T @ b.T; f = x @ up.T + bias > 0; "
         "low = np.where(f, s, np.inf).min(0); "
         "return a, b, np.where(np.isinf(low), -1e9, 1e-3 * s.std() - low)",
         "NO  of a further text missed"),
        # The best low-rank up projection, whatever its inputs are.
        ("u, s, v = np.linalg.svd(up, full_matrices=False); "
         "a, b = v[:rank], u[:, :rank] * s[:rank]; t = x @ a.T @ b.T + bias; "
         "f = x @ up.T + bias > 0; "
         "return a, b, bias - min(0, t[f].min(initial=0)) + 1e-3 * t.std()",
         "NO  neurons predicted a token"),
    ],
    4: [
        ("return offsets, lengths", r"reads; \d+ would do"),
        ("return offsets[:1], offsets[-1:] + lengths[-1:] - offsets[:1]",
         "longer than most_bytes|spans a gap"),
        ("o, n = own(*a); return o, n - 1", "lie in none of the reads"),
        ("o, n = own(*a); return o[::-1], n[::-1]", "not ascending|lie in none"),
        ("return own(offsets, lengths, gap_bytes + 1, most_bytes)", "spans a gap"),
        ("return own(offsets, lengths, gap_bytes, 1 << 30)", "longer than most_bytes"),
        ("o, n = own(*a); return o, n + 1", "should begin at"),
        ("return list(zip(*own(*a)))", "is wanted|offsets"),
    ],
    5: [
        ("return uses[: now + 1].sum(axis=0)", "but they are worth"),
        ("return np.zeros(uses.shape[1])", "but they are worth"),
        ("return -own(*a)", "but they are worth"),
        ("return own(uses, max(0, now - 1))", "but they are worth"),
        ("return own(*a)[:-1]", "must have the shape"),
        ("return np.full(uses.shape[1], np.inf)", "no finite numbers"),
        ("return ['a'] * uses.shape[1]", "array of numbers"),
    ],
    6: [
        ("return np.arange(len(scores))", "NO  neurons read late"),
        ("return np.zeros(0, dtype=int)", "NO  neurons read late"),
        ("return scores > 0", "array of whole numbers"),
        ("return np.argsort(scores)", "must be ascending"),
        ("return np.array([len(scores)])", "numbered from 0"),
        ("return np.flatnonzero(scores > 1)", "NO  neurons read late"),
        ("return np.flatnonzero(scores > -1)", "NO  neurons read for nothing"),
    ],
    7: [
        ("return [c.least for c in curves]", "can be had"),
        ("return [int(c.slots[-1]) for c in curves]", "more than there are"),
        ("return [0] * len(curves)", "must get from"),
        ("return [(n := room // sum(c.slot_bytes for c in curves))] * len(curves)",
         "must get from|can be had"),
        ("return own(*a)[:-1] or None", "must have the shape"),
        ("return [n + 0.5 for n in own(*a)]", "array of whole numbers"),
    ],
    8: [
        ("return [choose(row) for row in rows]", "choose was asked about the rows"),
        ("return list(draft) + [choose(rows[-1])]", "choose was asked about the rows"),
        ("return [choose(rows[0])]", "choose was asked about the rows"),
        ("t = own(*a); return t[:-1]", "the model writes"),
        ("t = own(*a); return t[0]", "a list of tokens is wanted"),
        ("return own(lambda row: int(row.argmax()), rows, draft)", "choose was asked about"),
        ("t = own(*a); choose(rows[0]); return t", "choose was asked about the rows"),
    ],
}  # fmt: skip


def written(path, lesson, body):
    """A file with an answer that may call the engine's own function, ``own``, with ``a``."""
    function = lesson.solution
    names = ", ".join(function.__code__.co_varnames[: function.__code__.co_argcount])
    path.write_text(
        "import numpy as np\n"
        f"from {function.__module__} import {function.__name__} as own\n"
        f"def {function.__name__}({names}):\n    a = ({names},)\n    {body}\n"
    )
    return path


@pytest.mark.parametrize("number", NUMBERS)
def test_own_functions_pass(number, tmp_path, capsys):
    path = written(tmp_path / "own.py", LESSONS[number - 1], "return own(*a)")
    assert main(["check", str(number), str(path), "--json", str(tmp_path / "x.json")]) == 0
    told = capsys.readouterr().out
    assert ": passed" in told and LESSONS[number - 1].ENGINE in told
    figures = json.loads((tmp_path / "x.json").read_text())
    assert figures["passed"] and all(grade["passed"] for grade in figures["grades"])
    assert figures["grades"][0]["figure"] == figures["grades"][0]["own"]


@pytest.mark.parametrize("number", NUMBERS)
def test_wrong_answers_are_refused(number, tmp_path, capsys):
    for body, line in WRONG[number]:
        path = written(tmp_path / "wrong.py", LESSONS[number - 1], body)
        assert main(["check", str(number), str(path)]) == 1, body
        out, err = capsys.readouterr()
        assert ": not yet" in out and "Traceback" not in out + err, body
        told = [text for text in out.splitlines() if text.startswith(("NO", str(path)))]
        assert re.search(line, "\n".join(told)), (body, out)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_file_to_fill_in(number, tmp_path, capsys):
    path, name = tmp_path / "mine.py", LESSONS[number - 1].solution.__name__
    assert main(["check", str(number)]) == 0
    assert capsys.readouterr().out == task(LESSONS[number - 1])
    assert main(["check", str(number), str(path), "--begin"]) == 0
    assert path.read_text() == task(LESSONS[number - 1])
    assert f"def {name}(" in path.read_text() and '"""' in path.read_text()
    assert main(["check", str(number), str(path)]) == 1
    assert "NotImplementedError" in capsys.readouterr().out
    assert main(["check", str(number), str(path), "--begin"]) == 1  # nothing is overwritten
    assert "exists" in capsys.readouterr().err


def test_files_that_are_no_answers(tmp_path, capsys):
    path = tmp_path / "x.py"
    for text, line in (
        ("def bundle(:\n", "line 1: "),
        ("import nothing_like_this\n", "line 1: ModuleNotFoundError"),
        ("bundle = 3\n", "defines no function called bundle"),
        ("class bundle: pass\n", "defines no function called bundle"),
        ("1 / 0\n", "line 1: ZeroDivisionError"),
        ("raise SystemExit\n", "line 1: SystemExit"),
        ("def bundle(up):\n    return up\n", "TypeError"),
        ("def bundle(up, down):\n    return bundle(up, down)\n", "RecursionError"),
        ("\0", "source code"),
        ("def bundle(up, down):\n\treturn up\n        return down\n", "line 3"),
    ):
        path.write_text(text)
        assert main(["check", "1", str(path)]) == 1
        out, err = capsys.readouterr()
        assert line in out and str(path) in out and "Traceback" not in out + err, (text, out)
    path.write_bytes(b"\xff\xfe\x00")
    assert main(["check", "1", str(path)]) == 1
    assert str(path) in capsys.readouterr().out
    for arguments, line in (([str(tmp_path)], "directory"), ([str(tmp_path / "no.py")], "--begin")):
        assert main(["check", "1", *arguments]) == 1
        assert line in capsys.readouterr().err
    assert main(["check", "0"]) == 2 and main(["check", "9"]) == 2 and main(["check"]) == 2


def test_an_answer_cannot_change_what_it_is_given(tmp_path):
    """What an answer does to its arguments changes none of the engine's arrays."""
    path = tmp_path / "x.py"
    path.write_text(
        textwrap.dedent("""
        import numpy as np
        def guess(scores):
            ids = np.flatnonzero(scores > 0)
            scores[:] = -1
            return ids
        """)
    )
    lesson = LESSONS[5]
    answer = loaded(path, "guess")
    lesson.examples(answer)
    assert all(grade.passed for grade in lesson.grades(answer, lambda share: None))


def test_the_engine_is_left_as_it_was(tmp_path):
    """After a wrong answer the engine's own functions stand where they stood."""
    from flashinfer import kernels
    from flashinfer.plan import slot_shares

    before = kernels.place, kernels.merge_reads, slot_shares.fewest_misses
    path = tmp_path / "x.py"
    path.write_text("calls = []\ndef merge(offsets, lengths, gap_bytes, most_bytes):\n"
                    "    calls.append(1)\n    return (offsets, lengths)\n")  # fmt: skip
    answer = loaded(path, "merge")
    with pytest.raises(Wrong):
        LESSONS[3].grades(answer, lambda share: None)
    assert before == (kernels.place, kernels.merge_reads, slot_shares.fewest_misses)


def test_values_in_messages_are_short():
    from flashinfer.course.lesson import shown

    assert shown(np.arange(3)) == "[0, 1, 2]"
    assert shown(np.zeros((50, 60), np.float32)) == "<array (50, 60) float32>"
    assert len(shown(list(range(1000)))) <= 100
