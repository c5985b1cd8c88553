"""RandAugment against the recorded original (beit3_randaug.pt): bit for bit, maximal difference 0."""

import numpy as np
import torch

from data.randaugment import POLICY_OPS, RandAugment, apply_op
from tests.parity.fixture_files import load_fixture

FIXTURE = "beit3_randaug.pt"


def test_every_recorded_operation_is_reproduced_bit_for_bit():
    recorded = load_fixture(FIXTURE)
    fill = recorded["config"]["fill"]
    cases = recorded["outputs"]["cases"]
    assert cases, "the recording has no cases"
    different = []
    for number, case in enumerate(cases):
        image = recorded["inputs"]["images"][case["image"]].numpy()
        before = image.copy()
        out = apply_op(image, case["op"], case["arg"], reference=True, fill=fill)
        assert np.array_equal(image, before), f"{case['op']} wrote into its input"
        if not np.array_equal(out, case["output"].numpy()):
            worst = np.abs(out.astype(int) - case["output"].numpy().astype(int)).max()
            different.append((number, case["image"], case["op"], case["arg"], int(worst)))
    assert not different, different


def test_policy_runs_are_reproduced_bit_for_bit_under_numpy_seeds():
    recorded = load_fixture(FIXTURE)
    config = recorded["config"]
    policy = RandAugment(config["N"], config["M"], config["fill"], reference=True)
    image = recorded["inputs"]["images"][0].numpy()
    runs = recorded["outputs"]["policy_runs"]
    assert runs, "the recording has no policy runs"
    for run in runs:
        seed = run["numpy_seed"]
        drawn = np.random.RandomState(seed).choice(len(POLICY_OPS), config["N"])
        assert [POLICY_OPS[index] for index in drawn] == run["ops"], f"seed {seed}"
        out = policy(image, np.random.RandomState(seed))
        assert torch.equal(torch.tensor(out), run["output"]), f"seed {seed}: {run['ops']}"


def wraps_around(op, image, arg):
    """Whether the original's arithmetic leaves 0..255 on this image by more than rounding could."""
    if op == "AutoContrast":  # a channel that does not begin at 0 gets 256 steps too many
        low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
        return bool(((low > 0) & (low < high)).any())
    if op == "Sharpness" and min(image.shape[:2]) > 2:
        pixels = image.astype(float)
        height, width, _ = image.shape
        windows = [pixels[y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)]
        centre = pixels[1:-1, 1:-1]
        smooth = np.rint((sum(windows) + 4 * centre) / 13)
        sharp = smooth + arg * (centre - smooth)
        return bool(((sharp < -1.01) | (sharp > 256.01)).any())
    return False


def test_corrected_mode_differs_from_the_recording_only_in_autocontrast_and_sharpness():
    recorded = load_fixture(FIXTURE)
    changed = set()
    for number, case in enumerate(recorded["outputs"]["cases"]):
        image = recorded["inputs"]["images"][case["image"]].numpy()
        out = apply_op(image, case["op"], case["arg"], fill=recorded["config"]["fill"])
        differs = not np.array_equal(out, case["output"].numpy())
        assert differs or not wraps_around(case["op"], image, case["arg"]), (number, case["op"], case["arg"])
        if differs:
            changed.add(case["op"])
    assert changed <= {"AutoContrast", "Sharpness"}
