"""The verdict says what the counts say, and no more."""

import json
from dataclasses import replace

import pytest

from edgeft.diagnosis.report import Accuracy, Diagnosis, Parts, render

PARTS = Parts("onnx", Accuracy(930, 1000), Accuracy(430, 1000), Accuracy(150, 180), Accuracy(280, 820))
FOUND = Diagnosis("'ref'", "'shift'", "net", 1000, 1000, 820, 12, 0.97, (0.96, 0.98), ("zebra",), (PARTS,), ("a remark",))
UNLABELLED = Accuracy(0, 0)


def test_verdict_names_both_parts_with_intervals() -> None:
    assert FOUND.verdict == (
        "82.0 % [79.5, 84.3] of the shifted images lie out of the reference's support, where accuracy is 58.9 [55.1, 62.3] points lower: "
        "pre-training that knows such images, or a few of them in training, can help; in support accuracy is 9.7 [4.6, 16.0] points lower, "
        "which better pre-training is not expected to mend: look for bias or label shift, re-weight or curate the training images"
    )


def test_verdict_claims_no_loss_that_does_not_show() -> None:
    parts = replace(PARTS, inside=Accuracy(28, 30), outside=Accuracy(760, 820))
    verdict = replace(FOUND, models=(parts,)).verdict
    assert "support, where no loss of accuracy shows (0.3 [-2.0, 2.8] points)" in verdict
    assert verdict.endswith("in support no loss of accuracy shows (-0.3 [-5.5, 14.4] points, 30 images)")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (replace(FOUND, n_outside=0, auc=0.51, auc_interval=(0.48, 0.54)), "0.0 % [0.0, 0.4] do not (the features hardly tell them apart)"),
        (
            replace(FOUND, n_outside=30),
            "nearly all shifted images lie in the support of the reference, 3.0 % [2.1, 4.3] do not; in support",
        ),
        (replace(FOUND, models=()), "lie out of the reference's support, where pre-training that knows such images"),
        (replace(FOUND, models=(replace(PARTS, inside=UNLABELLED),)), "there are no labelled images in support, or none in the reference"),
        (replace(FOUND, n_outside=1000), "100.0 % [99.6, 100.0] of the shifted images"),
    ],
)
def test_verdict_in_other_cases(found: Diagnosis, words: str) -> None:
    assert words in found.verdict
    assert found.verdict.count(";") == (0 if found.n_outside == found.n_shift else 1)


def test_text_has_counts_table_and_notes() -> None:
    text = render(replace(FOUND, models=(replace(PARTS, inside=Accuracy(15, 18)),)))
    assert "out of support: 820 of 1000 shifted images, 82.0 % [79.5, 84.3] (reference images mistaken for such: 12 of 1000)" in text
    assert "onnx   reference         1000  93.0 [91.2, 94.4]" in text
    assert "         out of support  820   34.1 [31.0, 37.5]  58.9 [55.1, 62.3]" in text
    assert "note: a remark" in text
    assert text.endswith("warning: accuracy of the part in support rests on 18 labelled images: its interval is 33 points wide")


def test_unlabelled_parts_have_no_accuracy() -> None:
    parts = Parts("float", UNLABELLED, UNLABELLED, UNLABELLED, UNLABELLED)
    found = replace(FOUND, models=(parts,))
    assert "reference         0  -" in render(found)
    assert found.warnings == ()
    assert found.to_json()["models"][0]["ref"] == {"n": 0, "correct": 0, "top1": None, "interval": None}


def test_json_is_plain() -> None:
    tree = json.loads(json.dumps(FOUND.to_json(), allow_nan=False))
    assert tree["out_of_support"]["n"] == 820
    assert tree["unknown_classes"] == ["zebra"]
    assert tree["models"][0]["in_support"]["correct"] == 150
    assert tree["verdict"] == FOUND.verdict
