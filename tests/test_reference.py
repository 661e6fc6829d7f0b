"""The float64 model of `golden/reference.py` against what Transformers said: the goldens are sound.

Needs numpy only, and no engine: a failure here means that a golden, or the reference, is wrong.
"""

import json

import numpy as np
import pytest
from golden import ops_checks, reference
from golden.cases import CASES, Golden

OPS = ops_checks.load_cases()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy(name):
    golden, net = Golden(name), reference.Net(Golden(name).path)
    for prompt in golden.prompts:
        logits = net(prompt.sequence)
        ops_checks.close(logits[prompt.rows], prompt.logits, 5e-5)
        assert logits[len(prompt.tokens) - 1 :].argmax(1).tolist() == prompt.greedy


@pytest.mark.parametrize("name", CASES)
def test_margins_exceed_what_the_tests_allow(name):
    facts = json.loads((Golden(name).path / "expected.json").read_text())
    assert facts["argmax_margin"] >= 4 * Golden.TOLERANCE
    assert (facts["router_margin"] or 1) >= 1e-4
    for prompt in facts["prompts"]:
        assert prompt["from_float64"]["max"] <= Golden.TOLERANCE / 4
        assert prompt["largest_logit"] > 5 and prompt["logit_spread"] > 1


@pytest.mark.parametrize("case", [case for case in OPS if case.split("/")[0] in ops_checks.CHECKS])
def test_op(case):
    ops_checks.CHECKS[case.split("/")[0]](reference, *OPS[case])


@pytest.mark.parametrize("case", [case for case in OPS if case.startswith("gated_rms_norm")])
def test_gated_rms_norm(case):
    a, settings = OPS[case]
    ops_checks.close(reference.gated_rms_norm(a["x"], a["gate"], a["weight"], settings["eps"]), a["y"])


def test_every_op_of_the_file_is_checked():
    ops = {case.split("/")[0] for case in OPS}
    assert ops == {*ops_checks.CHECKS, "gated_rms_norm"}
    assert np.load(ops_checks.OPS_FILE)["route/family/logits"].shape[1] == 256
