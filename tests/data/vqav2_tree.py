"""A small data folder in the official layout of VQA v2, for tests to leave out or break any part of it."""

import json

from tests.paths import FIXTURES

SPM = FIXTURES / "evaluation_tokenizer.spm"
ANSWERS = ("yes", "no", "red", "2")


def question(image_id, running, text="is the circle red?"):
    return {"image_id": image_id, "question": text, "question_id": image_id * 1000 + running}


def annotation(image_id, running, answer, others=()):
    """Ten answers: the given one, some of them replaced by ``others``."""
    texts = [*others, *[answer] * (10 - len(others))]
    return {
        "question_id": image_id * 1000 + running,
        "image_id": image_id,
        "question_type": "is the",
        "answer_type": "other",
        "multiple_choice_answer": answer,
        "answers": [{"answer": t, "answer_confidence": "yes", "answer_id": i + 1} for i, t in enumerate(texts)],
    }


def image_name(split, image_id):
    return f"COCO_{split}_{image_id:012d}.jpg"


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_vqav2(root, *, annotations="vqa", images="", test=True, num_train=20, num_val=10):
    """Two questions an image; train images 1.., val 101.., test 201, 202; the last val question has no known answer."""
    folder = root / annotations
    for split, first, count in (("train2014", 1, num_train), ("val2014", 101, num_val)):
        ids = range(first, first + count)
        questions = [question(i, r) for i in ids for r in (0, 1)]
        entries = [annotation(i, r, ANSWERS[(i + r) % 4], others=["maybe"]) for i in ids for r in (0, 1)]
        if split == "val2014":
            entries[-1] = annotation(ids[-1], 1, "a purple unicorn")
        write_json(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        write_json(folder / f"v2_mscoco_{split}_annotations.json", {"annotations": entries})
        write_images(root / images, split, ids)
    if test:
        both = [question(i, 0) for i in (201, 202)]
        write_json(folder / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": both})
        write_json(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": both[:1]})
        write_images(root / images, "test2015", (201, 202))
    return root


def write_images(folder, split, ids):
    (folder / split).mkdir(parents=True, exist_ok=True)
    for image_id in ids:
        (folder / split / image_name(split, image_id)).touch()


def edit_json(path, change):
    """Load, let ``change`` work on the content, write back."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write_json(path, content)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
