"""What a CLIP knows of held-out pictures: retrieval, zero-shot answers, and where its directions
point.

Legend: N pictures, M prompts, D embedding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.losses.clip import Clip
from tasks.training.assets.captions import MEDIUM_WORDS, Subject, subject, wording
from tasks.training.assets.labels import MEDIA, LabelledPictures
from tasks.training.trainer import to_images

FORMS = ("{}", "a face, {}", "{} of a face", "{} of a person", "the face of a person, {}")
"""Around a medium, for zero-shot prompts."""
QUESTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gender": (("a man", "a photo of a man"), ("a woman", "a photo of a woman")),
    "smile": (
        ("a serious person", "a photo of a person with a serious expression"),
        ("a smiling person", "a photo of a person with a smile"),
    ),
    "age": (
        ("a young person", "a photo of a young person"),
        ("a middle-aged person", "a photo of a middle-aged person"),
        ("an old person", "a photo of an old person"),
    ),
}
"""Prompts of each answer, averaged."""
PLAIN = [0.0, 0.0, 0.99, 0.0, 0.99, 0.0, 0.5]
"""Numbers for `wording` that give one plain sentence, with the age as a decade."""


@torch.no_grad()
def clip_scores(clip: Clip, parts: Sequence[LabelledPictures]) -> dict[str, float]:
    """All scores, by name.

    `top1`, `top5`: share of pictures whose own full caption is among the best of all distinct ones.
    `zero_shot_*`: shares of right answers, each kind of picture weighing the same.
    `direction_*`: cosines between what separates two groups of pictures and two groups of prompts.
    `other_direction_*`: the largest of the same with the prompts of any other medium that is there.
    """
    device = str(clip.mean.device)
    found = [clip.images(to_images(x, device)).cpu() for p in parts for x in p.pictures.split(64)]
    images = torch.cat(found)
    medium = torch.cat([part.medium for part in parts])
    labels = {key: torch.cat([part.labels[key] for part in parts]) for key in parts[0].labels}
    scores = retrieval(clip, images, medium, labels)
    if len(medium.unique()) > 1:
        prompts = torch.stack([_centre(clip, medium_prompts(name)) for name in MEDIA])
        is_absent = medium.bincount(minlength=len(MEDIA)) == 0
        logits = (images @ prompts.T).masked_fill(is_absent, -torch.inf)
        scores["zero_shot_medium"] = balanced_accuracy(logits, medium)
        scores |= medium_directions(images, medium, prompts)
    answers = {
        "gender": labels["gender"],
        "smile": (labels["smile"] > 0.5).float().where(~labels["smile"].isnan(), torch.nan),
        "age": age_group(labels["age"]),
    }
    for name, values in answers.items():
        rows = ~values.isnan()
        if len(values[rows].unique()) < 2:
            continue
        prompts = torch.stack([_centre(clip, group) for group in QUESTIONS[name]])
        answer = values[rows].long()
        scores[f"zero_shot_{name}"] = balanced_accuracy(images[rows] @ prompts.T, answer)
        first, last = images[rows][answer == 0], images[rows][answer == len(prompts) - 1]
        if len(first) and len(last):
            scores[f"direction_{name}"] = _cosine(
                last.mean(0) - first.mean(0), prompts[-1] - prompts[0]
            )
    return scores


def retrieval(
    clip: Clip,
    images: Float[Tensor, "N D"],
    medium: Int[Tensor, " N"],
    labels: dict[str, Tensor],
) -> dict[str, float]:
    """Each picture's own caption, with all that is known of it, among all distinct ones."""
    columns = [labels[name].tolist() for name in ("age", "gender", "smile")]
    subjects = [subject(*row) for row in zip(medium.tolist(), *columns, strict=True)]
    sentences = [plain(what) for what in subjects]
    distinct = sorted(set(sentences))
    own = torch.tensor([distinct.index(sentence) for sentence in sentences])
    texts = torch.cat([clip.texts(distinct[at : at + 64]) for at in range(0, len(distinct), 64)])
    order = (images @ texts.cpu().T).argsort(1, descending=True)
    place = (order == own[:, None]).float().argmax(1)
    return {
        "captions": float(len(distinct)),
        "top1": float((place < 1).float().mean()),
        "top5": float((place < 5).float().mean()),
    }


def plain(what: Subject) -> str:
    """One sentence with all that is known."""
    return wording(what, PLAIN)


def medium_prompts(name: str) -> list[str]:
    """Prompts that name a medium and nothing else."""
    word = MEDIUM_WORDS[name][0]
    article = "an" if word[0] in "aeiou" else "a"
    return [form.format(f"{article} {word}") for form in FORMS]


def medium_directions(
    images: Float[Tensor, "N D"], medium: Int[Tensor, " N"], prompts: Float[Tensor, "M D"]
) -> dict[str, float]:
    """Cosines of (pictures of a style - photographs) with (its prompts - those of a photograph)."""
    found: dict[str, float] = {}
    if not bool((medium == 0).any()):
        return found
    photo = images[medium == 0].mean(0)
    for index, name in enumerate(MEDIA[1:], 1):
        if not bool((medium == index).any()):
            continue
        way = images[medium == index].mean(0) - photo
        cosines = {
            other: _cosine(way, prompts[other] - prompts[0])
            for other in medium.unique().tolist()
            if other
        }
        found[f"direction_{name}"] = cosines.pop(index)
        if cosines:
            found[f"other_direction_{name}"] = max(cosines.values())
    return found


def age_group(age: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """0 below 33 years, 1 from 38 to 56, 2 from 60 on, NaN between and where it is not known."""
    group = torch.full_like(age, torch.nan)
    group[age < 33] = 0
    group[(age >= 38) & (age <= 56)] = 1
    group[age >= 60] = 2
    return group


def balanced_accuracy(logits: Float[Tensor, "N M"], answer: Int[Tensor, " N"]) -> float:
    """Mean over the kinds of pictures of the share that is answered right."""
    is_right: Bool[Tensor, " N"] = logits.argmax(1) == answer
    kinds = answer.unique()
    return float(torch.stack([is_right[answer == kind].float().mean() for kind in kinds]).mean())


def _centre(clip: Clip, prompts: Sequence[str]) -> Float[Tensor, " D"]:
    return F.normalize(clip.texts(prompts).mean(0), dim=0).cpu()


def _cosine(a: Float[Tensor, " D"], b: Float[Tensor, " D"]) -> float:
    return float(F.cosine_similarity(a, b, dim=0))
