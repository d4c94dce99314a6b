"""What outputs mean: accuracy as a count, average precision against independent ones, detection by VOC's rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ablation_support import tiny_data
from torch import nn

from torch_pnn.ablation import data, detection, tasks


class Sometimes(nn.Module):
    """Right for images whose first pixel is positive, if class 1 is; never in training."""

    def forward(self, x):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        right = (x[:, 0, 0, 0] > 0).float()
        return torch.stack([1 - right, right], dim=1)


def batches_of(inputs, targets, size):
    return [(inputs[first : first + size], targets[first : first + size]) for first in range(0, len(targets), size)]


@pytest.mark.parametrize("images", [1, 255, 256, 257, 600])
def test_accuracy_is_a_count_over_the_whole_set(images):
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(images, 1, 2, 2, generator=generator)
    expected = int((pictures[:, 0, 0, 0] > 0).sum())
    labels = torch.ones(images, dtype=torch.int64)
    model = Sometimes()
    for size in (1, 7, 256, 1000):  # an average over batches would weigh a short last batch too much
        score = tasks.Classification(2).evaluate(model, batches_of(pictures, labels, size))
        assert (score.correct, score.total) == (expected, images)
        assert score.value == expected / images
        assert score.per_class == (None, expected / images)
    assert model.training


def test_classification_class_by_class_and_its_loss():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 3
    scores = [tasks.Classification(4).evaluate(nn.Identity(), batches_of(logits, labels, size)) for size in (1, 9, 50)]
    assert scores[0] == scores[1] == scores[2]  # to the last bit
    answers = logits.argmax(dim=1)
    for number in range(3):
        mine = labels == number
        assert scores[0].per_class[number] == int((answers[mine] == number).sum()) / int(mine.sum())
    assert scores[0].per_class[3] is None
    expected = -torch.log_softmax(logits.double(), dim=1)[torch.arange(50), labels].mean()
    assert scores[0].loss == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("task", [tasks.Classification(2), tasks.Multilabel(2), tasks.Detection(2)])
def test_a_test_without_images_is_refused(task):
    with pytest.raises(ValueError, match="at least one image"):
        task.evaluate(nn.Identity(), [])


def test_evaluation_leaves_statistics_modes_and_gradients_alone():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten())
    model[1].eval()  # a part that its owner froze stays frozen
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tasks.Classification(10).evaluate(model, [(torch.randn(5, 1, 2, 5), torch.zeros(5, dtype=torch.int64))])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False, True]

    class Failing(nn.Module):
        def forward(self, _):
            raise RuntimeError("no")

    model = Failing()
    with pytest.raises(RuntimeError, match="no"):
        tasks.Classification(10).evaluate(model, [(torch.zeros(1), torch.zeros(1))])
    assert model.training
    assert not torch.is_inference_mode_enabled()


def test_training_steps():
    logits = torch.randn(6, 3, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    loss, correct = tasks.Classification(3).training_step(nn.Identity(), logits, labels)
    assert float(loss.detach()) == pytest.approx(float(nn.CrossEntropyLoss()(logits, labels).detach()))
    assert int(correct) == int((logits.argmax(dim=1) == labels).sum())
    tasks.Classification(3).loss(nn.Identity(), logits, labels).backward()
    assert logits.grad.abs().sum() > 0

    targets = torch.tensor([[1.0, 0, -1], [0, 1, 1]])
    logits = torch.randn(2, 3, requires_grad=True)
    loss, correct = tasks.Multilabel(3).training_step(nn.Identity(), logits, targets)
    probability = torch.sigmoid(logits)
    kept = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1), (1, 2, 1)]
    expected = [-math.log(float(probability[r, c] if one else 1 - probability[r, c])) for r, c, one in kept]
    assert float(loss) == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert correct is None
    loss.backward()
    assert logits.grad[0, 2] == 0  # what is too hard to see trains nothing
    assert (logits.grad != 0).sum() == 5
    nothing = torch.full((1, 3), -1.0)
    assert float(tasks.Multilabel(3).loss(nn.Identity(), torch.randn(1, 3), nothing)) == 0


def test_the_task_follows_from_the_data():
    assert isinstance(tasks.find_task(tiny_data()), tasks.Classification)
    images, targets = torch.zeros(2, 1, 2, 2), torch.zeros(2, 3)
    several = data.TensorDataset("m", "", ("a", "b", "c"), (images, targets), (images, targets), task="multilabel")
    assert isinstance(tasks.find_task(several), tasks.Multilabel)
    assert [tasks.find_task(tiny_data()).metric, tasks.find_task(several).metric, tasks.Detection.metric] == [
        "accuracy",
        "mAP",
        "mAP@0.5",
    ]


# -------------------------------------------------------------------------------------------------- average precision


def _interpolated(scores, right):
    """With scikit-learn's curve: at each threshold, the highest precision at this recall or a higher one."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(right, scores)
    area = 0.0
    for place in range(len(recall) - 1):  # from the highest recall to the lowest
        area += (recall[place] - recall[place + 1]) * precision[: place + 1].max()
    return area


@pytest.mark.parametrize("levels", [0, 3, 20])
def test_average_precision_against_scikit_learn(levels):
    from sklearn.metrics import average_precision_score

    generator = np.random.default_rng(levels)
    for size in (1, 2, 5, 50, 500):
        for _ in range(20):
            right = generator.random(size) < 0.3
            right[generator.integers(size)] = True
            scores = generator.random(size) + 0.3 * right
            scores = np.floor(scores * levels) if levels else scores  # with few levels there are ties
            found = detection.average_precision(scores, right)
            assert found == pytest.approx(_interpolated(scores, right), abs=1e-12)
            # Without the interpolation it can only be less.
            assert found >= average_precision_score(right, scores) - 1e-12
            shuffled = generator.permutation(size)
            assert detection.average_precision(scores[shuffled], right[shuffled]) == found


def test_average_precision_by_hand():
    def of(scores, right, **wanted):
        return detection.average_precision(np.array(scores, dtype=float), np.array(right, dtype=bool), **wanted)

    assert of([3, 2, 1], [1, 0, 1]) == pytest.approx((1 + 2 / 3) / 2)
    assert of([3, 2, 1], [0, 0, 1]) == pytest.approx(1 / 3)
    assert of([4, 3, 2, 1], [0, 1, 1, 0]) == pytest.approx(2 / 3)  # the first find has the later, higher precision
    assert of([1, 1, 1, 1], [1, 0, 0, 0]) == pytest.approx(1 / 4)  # no ranking at all
    assert of([2, 1], [1, 1], wanted=4) == pytest.approx(1 / 2)  # two were never found
    assert of([2, 1], [0, 0], wanted=4) == 0
    assert of([], [], wanted=4) == 0
    assert of([2, 1], [0, 0]) is None
    assert of([], []) is None
    assert detection.mean([0.5, None, 1.0]) == 0.75
    assert detection.mean([None]) == 0


def test_multilabel_by_class_and_without_what_is_too_hard():
    generator = np.random.default_rng(0)
    scores = torch.from_numpy(generator.normal(size=(60, 4)).astype(np.float32))
    targets = torch.from_numpy(generator.choice([-1.0, 0.0, 1.0], size=(60, 4), p=[0.2, 0.5, 0.3]).astype(np.float32))
    targets[:, 3] = targets[:, 3].clamp(max=0)
    results = [tasks.Multilabel(4).evaluate(nn.Identity(), batches_of(scores, targets, size)) for size in (1, 8, 60)]
    assert results[0] == results[1] == results[2]
    for number in range(3):
        kept = targets[:, number] >= 0
        expected = _interpolated(scores[kept, number].numpy(), targets[kept, number].numpy() == 1)
        assert results[0].per_class[number] == pytest.approx(expected, abs=1e-12)
    assert results[0].per_class[3] is None
    assert results[0].value == pytest.approx(sum(results[0].per_class[:3]) / 3)
    assert (results[0].correct, results[0].total) == (None, 60)
    changed = scores.clone()
    changed[targets == -1] += 100
    again = tasks.Multilabel(4).evaluate(nn.Identity(), [(changed, targets)])
    assert again == results[0]


# ---------------------------------------------------------------------------------------------------------- detection


def _development_kit(images, number):
    """One class's average precision as VOC's development kit computes it, in plain loops (VOCevaldet.m)."""
    found = [
        (score, place, box)
        for place, (boxes, classes, scores, *_) in enumerate(images)
        for box, kind, score in zip(boxes, classes, scores)
        if kind == number
    ]
    found.sort(key=lambda item: -item[0])
    wanted = sum(
        1 for *_, kinds, difficult in images for kind, hard in zip(kinds, difficult) if kind == number and not hard
    )
    used = set()
    true, false = [], []
    for _, place, box in found:
        *_, objects, kinds, difficult = images[place]
        best, nearest = -1.0, None
        for which, (other, kind) in enumerate(zip(objects, kinds)):
            if kind != number:
                continue
            width = min(box[2], other[2]) - max(box[0], other[0])
            height = min(box[3], other[3]) - max(box[1], other[1])
            if width > 0 and height > 0:
                shared = width * height
                union = (box[2] - box[0]) * (box[3] - box[1]) + (other[2] - other[0]) * (other[3] - other[1]) - shared
                if shared / union > best:
                    best, nearest = shared / union, which
        if best >= 0.5:
            if difficult[nearest]:
                continue
            first = (place, nearest) not in used
            used.add((place, nearest))
            true.append(first)
            false.append(not first)
        else:
            true.append(False)
            false.append(True)
    if not wanted:
        return None
    recalls, precisions, hits = [0.0], [0.0], 0
    for rank, one in enumerate(true, 1):
        hits += one
        recalls.append(hits / wanted)
        precisions.append(hits / rank)
    recalls.append(1.0)
    precisions.append(0.0)
    for place in range(len(precisions) - 2, -1, -1):
        precisions[place] = max(precisions[place], precisions[place + 1])
    return sum((recalls[i] - recalls[i - 1]) * precisions[i] for i in range(1, len(recalls)))


def _random_images(seed, count=12, classes=3):
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        objects = generator.integers(0, 5)
        corners = generator.integers(0, 12, (objects, 2)).astype(float)
        truth = np.concatenate([corners, corners + generator.integers(3, 9, (objects, 2))], axis=1)
        kinds = generator.integers(0, classes, objects)
        # Finds: near the objects, several on one, some of another class, some anywhere.
        near = (
            truth[generator.integers(0, objects, 8)] + generator.normal(0, 1, (8, 4)) if objects else np.empty((0, 4))
        )
        anywhere = generator.integers(0, 12, (4, 2)).astype(float)
        boxes = np.concatenate([near, truth, np.concatenate([anywhere, anywhere + 5], axis=1)])
        classes_found = generator.integers(0, classes, len(boxes))
        images.append(
            (boxes, classes_found, generator.random(len(boxes)), truth, kinds, generator.random(objects) < 0.3)
        )
    return images


@pytest.mark.parametrize("seed", range(20))
def test_detection_against_the_development_kits_loops(seed):
    images = _random_images(seed)
    evaluator = detection.Evaluator(4)
    for boxes, classes, scores, truth, kinds, difficult in images:
        evaluator.add(
            detection.Boxes(boxes, classes, scores), detection.Boxes(truth, kinds, np.ones(len(kinds))), difficult
        )
    found = evaluator.average_precisions()
    assert found[3] is None
    expected = [_development_kit(images, number) for number in range(3)]
    assert all(value is not None and 0 < value < 1 for value in expected)
    assert found[:3] == pytest.approx(expected, abs=1e-12)


def _one_image(found, scores, truth, difficult=None, classes=None):
    evaluator = detection.Evaluator(1)
    difficult = np.zeros(len(truth), bool) if difficult is None else np.array(difficult)
    evaluator.add(
        detection.Boxes(np.array(found, float).reshape(-1, 4), np.zeros(len(found), int), np.array(scores, float)),
        detection.Boxes(np.array(truth, float).reshape(-1, 4), np.zeros(len(truth), int), np.ones(len(truth))),
        difficult,
    )
    return evaluator.average_precisions()[0]


def test_detection_by_hand():
    box, half, less = (0, 0, 10, 10), (0, 0, 10, 5), (0, 0, 10, 4.999)
    assert _one_image([box], [0.5], [box]) == 1
    assert _one_image([half], [0.5], [box]) == 1  # an overlap of exactly a half is enough
    assert _one_image([less], [0.5], [box]) == 0
    assert _one_image([box, box], [0.9, 0.8], [box]) == 1  # a second find is wrong, after the only one
    assert _one_image([box, box], [0.9, 0.8], [box, (20, 20, 30, 30)]) == 0.5
    assert _one_image([box, box, (20, 20, 30, 30)], [0.9, 0.8, 0.7], [box, (20, 20, 30, 30)]) == pytest.approx(
        0.5 * 1 + 0.5 * 2 / 3
    )
    assert _one_image([], [], [box]) == 0
    assert _one_image([box], [0.5], []) is None
    assert _one_image([box], [0.5], [box], [True]) is None  # difficult: not wanted
    other = (20, 20, 30, 30)
    assert _one_image([box, other], [0.9, 0.8], [box, other], [True, False]) == 1  # nor held against the finder
    assert _one_image([(50, 50, 60, 60), other], [0.9, 0.8], [box, other], [True, False]) == 0.5
    # The nearest object decides, even where it has been found and another would do (as in the development kit).
    left, right = (0, 0, 10, 10), (3, 0, 13, 10)
    assert _one_image([left, (1, 0, 11, 10)], [0.9, 0.8], [left, right]) == 0.5


def test_empty_boxes_overlap_nothing():
    found = detection.overlaps(np.array([[5.0, 5, 5, 5], [4, 4, 2, 2]]), np.array([[5.0, 5, 5, 5], [0, 0, 9, 9]]))
    assert found.tolist() == [[0, 0], [0, 0]]
    assert detection.overlaps(np.empty((0, 4)), np.empty((3, 4))).shape == (0, 3)


class Oracle(nn.Module):
    """A detector that sees what is written in an image: boxes in its pixels; in training, losses."""

    def forward(self, images, targets=None):
        if self.training:
            return {"boxes": sum(image.mean() for image in images), "classes": torch.tensor(2.0)}
        return [
            {"boxes": image[0, :, :4], "labels": image[0, :, 4].long(), "scores": image[0, :, 5]} for image in images
        ]


def test_detection_through_a_detector_whatever_the_batches():
    images, targets = [], []
    raw = _random_images(3)
    for boxes, classes, scores, truth, kinds, difficult in raw:
        written = np.concatenate([boxes, classes[:, None] + 1, scores[:, None]], axis=1)
        images.append(torch.from_numpy(written).float()[None])
        targets.append(
            {
                "boxes": torch.from_numpy(truth).float(),
                "labels": torch.from_numpy(kinds) + 1,
                "difficult": torch.from_numpy(difficult),
            }
        )
    model = Oracle()
    task = tasks.Detection(3)
    scores = [task.evaluate(model, batches_of(images, targets, size)) for size in (1, 5, 12)]
    assert scores[0] == scores[1] == scores[2]
    assert scores[0].per_class == pytest.approx([_development_kit(raw, number) for number in range(3)], abs=1e-6)
    assert scores[0].value == pytest.approx(np.mean(scores[0].per_class))
    assert (scores[0].loss, scores[0].correct, scores[0].total) == (None, None, 12)
    assert model.training
    loss, correct = task.training_step(model, [torch.ones(3, 2, 2), torch.ones(3, 4, 4)], targets[:2])
    assert (float(loss), correct) == (4.0, None)
