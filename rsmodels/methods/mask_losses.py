"""Mask2Former's losses (Cheng et al. 2022, https://arxiv.org/abs/2112.01527, section 3.3) for semantic masks.

Every class that an image shows is one segment. Each decoder stage's queries are matched with the segments
one to one; matched queries learn class and mask, the others "no object". Masks are compared at sampled
points, as PointRend does (Kirillov et al. 2020, https://arxiv.org/abs/1912.08193).

Ignored pixels take part in nothing. Points are drawn over the area of the other pixels: one that falls into
an ignored pixel moves to the same place within a pixel drawn among the others, so that points stay uniform
and their number fixed. A point's label is interpolated between those of the four pixels around it that are
not ignored. An image of ignored pixels alone has no segments, and none of its queries learns anything. Where
no pixel is ignored all this is what the authors' code computes.

Shapes: B batch, K classes, Q queries, P points, M segments of an image, N pairs of segment and query in a
stage or other rows of points, h/w pixels of the predicted masks, H/W image pixels. Points are (x, y), from
(0, 0) in the upper left corner of the image to (1, 1).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rsmodels.heads.mask2former import Mask2FormerOutput
from rsmodels.methods.losses import check_ids

IGNORED, OUTSIDE = -1, -2  # in the place of class ids


def mask2former_losses(
    output: Mask2FormerOutput,
    mask: Tensor,
    *,
    num_classes: int,
    class_weight: float = 2.0,
    mask_weight: float = 5.0,
    dice_weight: float = 5.0,
    no_object: float = 0.1,
    points: int = 12544,
    oversample: float = 3.0,
    importance: float = 0.75,
    ignore_index: int = 255,
) -> dict[str, Tensor]:
    """{"class": cross entropy, "mask": binary cross entropy, "dice": Dice}, each weighted and summed over the
    decoder stages: scalars in float32.

    Args:
        output: of Mask2FormerHead.
        mask: (B, H, W) class ids; pixels of `ignore_index` are left out of everything.
        num_classes: K.
        class_weight, mask_weight, dice_weight: of the terms, and of the costs that the matching minimises.
        no_object: weight of "no object" in the cross entropy.
        points: P, of each mask; small images need fewer than the default.
        oversample, importance: `importance` of a mask's points are the most uncertain ones of `oversample`·P,
            the others are drawn uniformly.

    Mask and Dice terms are divided by the number of segments, the cross entropy by the sum of its weights. In
    training on several ranks both are means over the ranks, so that the ranks' losses and gradients average
    to those of all their images in one process; without gradients each rank takes its own, for it may have
    another number of batches. Without any segment the terms are 0, and still have a gradient.

    Points come from torch's global generator.
    """
    _check(output, mask, num_classes, ignore_index)
    _check_sampling(points, oversample, importance)
    costs = Costs(class_weight, mask_weight, dice_weight)
    with torch.autocast(mask.device.type, enabled=False):
        targets = find_segments(mask, num_classes, ignore_index)
        queries = output.classes[0].shape[1]
        paired = [min(count, queries) for count in targets.counts if count]
        class_sum = sum(pairs + no_object * (queries - pairs) for pairs in paired)
        segments, weights = _mean_over_ranks([sum(targets.counts), class_sum], mask.device)

        stages = list(zip(output.classes, output.masks, strict=True))
        # All of them first: a GPU is waited for once.
        costs_of_stages = [_stage_costs(classes, masks, targets, points, costs) for classes, masks in stages]
        terms = []
        for (classes, masks), stage_costs in zip(stages, costs_of_stages, strict=True):
            pairs = _pair(stage_costs, targets)
            ce = _class_term(classes, pairs, targets, no_object)
            bce, dice = _mask_terms(masks, pairs, targets, points, oversample, importance)
            terms.append(torch.stack([ce / weights, bce / segments, dice / segments]))
        ce, bce, dice = torch.stack(terms).sum(0)
    return {"class": class_weight * ce, "mask": mask_weight * bce, "dice": dice_weight * dice}


class Targets(NamedTuple):
    """What find_segments finds.

    ids: (B, H + 2, W + 2) class ids in a frame of one pixel: IGNORED and OUTSIDE are no classes.
    counts: number of segments of each image.
    classes: (ΣM,) ids of the segments, image by image, ascending.
    shown: indices of the images that have segments.
    pixels: what is not ignored, as indices into the (B, H, W) pixels, and starts: (B + 1,) where each image's
        begin there; both None where nothing is ignored.
    """

    ids: Tensor
    counts: list[int]
    classes: Tensor
    shown: Tensor
    pixels: Tensor | None
    starts: Tensor | None


class Pairs(NamedTuple):
    """The matching of a stage: image, query and class id of each pair, (N,)."""

    images: Tensor
    queries: Tensor
    classes: Tensor


class Costs(NamedTuple):
    """Weights of the matching's costs."""

    class_weight: float
    mask_weight: float
    dice_weight: float


def find_segments(mask: Tensor, num_classes: int, ignore_index: int) -> Targets:
    """The segments of semantic masks (B, H, W): one for each class that an image shows."""
    ids = torch.where(mask == ignore_index, IGNORED, mask.long())
    flat = ids.flatten(1)
    area = flat.new_zeros(len(flat), num_classes + 1)
    area.scatter_add_(1, flat % (num_classes + 1), torch.ones_like(flat))  # ignored ones in the last column
    present = area[:, :num_classes] > 0
    shown, classes = present.any(1).nonzero()[:, 0], present.nonzero()[:, 1]
    pixels = starts = None
    if area[:, num_classes].any():
        pixels = (flat != IGNORED).flatten().nonzero()[:, 0]
        starts = F.pad(area[:, :num_classes].sum(1).cumsum(0), (1, 0))
    framed = F.pad(ids, (1, 1, 1, 1), value=OUTSIDE)
    return Targets(framed, present.sum(1).tolist(), classes, shown, pixels, starts)


# ---------------------------------------------------------------- matching


def matching_costs(
    class_logits: Tensor, mask_logits: Tensor, classes: Tensor, labels: Tensor, costs: Costs
) -> Tensor:
    """What it costs to pair each query of an image with each of its segments: (Q, M).

    Args:
        class_logits: (Q, K + 1). mask_logits: (Q, P).
        classes: (M,). labels: (M, P) in [0, 1].
    """
    probabilities = mask_logits.sigmoid()
    # −t·log p − (1 − t)·log(1 − p) = softplus(x) − t·x, for all pairs by one product.
    bce = F.softplus(mask_logits).mean(1, keepdim=True) - mask_logits @ labels.T / labels.shape[1]
    overlap = probabilities @ labels.T
    dice = 1 - (2 * overlap + 1) / (probabilities.sum(1, keepdim=True) + labels.sum(1) + 1)
    class_cost = -class_logits.softmax(-1)[:, classes]
    return costs.class_weight * class_cost + costs.mask_weight * bce + costs.dice_weight * dice


def assign(costs: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest pairing of rows and columns of (Q, M) costs, each used once at most: min(Q, M) indices of
    rows, ascending, and of their columns. Costs that are no finite numbers count as the largest ones."""
    from scipy.optimize import linear_sum_assignment

    highest = torch.finfo(costs.dtype).max
    finite = costs.detach().cpu().nan_to_num(nan=highest, posinf=highest, neginf=highest)
    rows, columns = linear_sum_assignment(finite.numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)


@torch.no_grad()
def _stage_costs(classes: Tensor, masks: Tensor, targets: Targets, points: int, costs: Costs) -> list[Tensor]:
    """matching_costs of the images that have segments, at points of their own."""
    where = draw_points(targets, targets.shown, points)
    mask_logits = _sample(masks[targets.shown], where)
    class_logits = classes[targets.shown].to(mask_logits.dtype)
    neighbours = _neighbours(targets, targets.shown, where)
    segments = targets.classes.split([count for count in targets.counts if count])
    found = []
    for row, shown in enumerate(segments):
        labels = _labels([(ids[row], shares[row]) for ids, shares in neighbours], shown)
        labels = labels.to(mask_logits.dtype)
        found.append(matching_costs(class_logits[row], mask_logits[row], shown, labels, costs))
    return found


def _pair(stage_costs: list[Tensor], targets: Targets) -> Pairs:
    """The cheapest pairs of every image that has segments."""
    segments = targets.classes.split([count for count in targets.counts if count])
    images, queries, classes = [], [], []
    for image, shown, costs in zip(targets.shown, segments, stage_costs, strict=True):
        rows, columns = (indices.to(shown.device) for indices in assign(costs))
        images.append(image.expand(len(rows)))
        queries.append(rows)
        classes.append(shown[columns])
    none = targets.classes.new_zeros(0)  # a batch without segments has no pairs
    return Pairs(*(torch.cat([none, *parts]) for parts in (images, queries, classes)))


# ---------------------------------------------------------------- terms of one stage, sums


def _class_term(classes: Tensor, pairs: Pairs, targets: Targets, no_object: float) -> Tensor:
    """Weighted cross entropy of all queries of the images that have segments."""
    batch, queries, outcomes = classes.shape
    nothing = outcomes - 1
    wanted = torch.full((batch, queries), nothing, device=classes.device)
    wanted[pairs.images, pairs.queries] = pairs.classes
    weights = classes.new_zeros(batch, 1, dtype=torch.float32).index_fill_(0, targets.shown, 1.0)
    weights = torch.where(wanted == nothing, no_object * weights, weights)
    logits = classes.transpose(1, 2).to(_wide(classes))
    return (weights * F.cross_entropy(logits, wanted, reduction="none")).sum()


def _mask_terms(
    masks: Tensor, pairs: Pairs, targets: Targets, points: int, oversample: float, importance: float
) -> tuple[Tensor, Tensor]:
    """Binary cross entropy, mean over a pair's points, and Dice, both summed over the pairs."""
    maps = masks[pairs.images, pairs.queries].unsqueeze(1)
    where = _uncertain_points(maps.detach(), pairs, targets, points, oversample, importance)
    labels = _labels(_neighbours(targets, pairs.images, where), pairs.classes)
    logits = _sample(maps, where)[:, 0]
    labels = labels.to(logits.dtype)
    bce = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1).sum()
    p = logits.sigmoid()
    dice = 1 - (2 * (p * labels).sum(1) + 1) / (p.sum(1) + labels.sum(1) + 1)
    return bce, dice.sum()


@torch.no_grad()
def _uncertain_points(
    maps: Tensor, pairs: Pairs, targets: Targets, points: int, oversample: float, importance: float
) -> Tensor:
    """(N, P, 2): the points of maps (N, 1, h, w) whose logits are nearest to 0, and others."""
    candidates = draw_points(targets, pairs.images, int(points * oversample))
    uncertain = int(points * importance)
    certainty = _sample(maps, candidates)[:, 0].abs()
    chosen = certainty.topk(uncertain, dim=1, largest=False, sorted=False).indices
    chosen_points = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([chosen_points, draw_points(targets, pairs.images, points - uncertain)], dim=1)


# ---------------------------------------------------------------- points


def draw_points(targets: Targets, images: Tensor, count: int) -> Tensor:
    """`count` points for each of `images` (N,), uniform over what is not ignored there: (N, count, 2)."""
    points = torch.rand(len(images), count, 2, device=images.device)
    if targets.pixels is None or targets.starts is None:
        return points
    height, width = (side - 2 for side in targets.ids.shape[1:])
    x, y = points[..., 0] * width, points[..., 1] * height
    column, row = x.long().clamp(max=width - 1), y.long().clamp(max=height - 1)
    ignored = targets.ids.take(_framed_index(targets, images, row, column)) == IGNORED
    image = images[:, None].expand_as(ignored)[ignored]
    start = targets.starts[image]
    available = targets.starts[image + 1] - start
    drawn = (torch.rand(len(image), device=images.device) * available).long().minimum(available - 1)
    pixel = targets.pixels[start + drawn] % (height * width)
    moved_x = (pixel % width + (x - column)[ignored]) / width
    moved_y = (pixel // width + (y - row)[ignored]) / height
    points[ignored] = torch.stack([moved_x, moved_y], dim=-1)
    return points


def _neighbours(targets: Targets, images: Tensor, points: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Class id of each of the four pixels around each of points (N, P, 2), and its share in the point's label
    by bilinear interpolation, (N, P) both.

    Outside the image nothing is labelled, as in grid_sample, which the mask logits are sampled with: labels
    at the rim are less than 1. An ignored pixel's share goes to the others.
    """
    height, width = (side - 2 for side in targets.ids.shape[1:])
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    right_share, lower_share = x - left, y - top
    upper_left = _framed_index(targets, images, top.long(), left.long())
    neighbours = []
    for row, row_share in enumerate((1 - lower_share, lower_share)):
        for column, column_share in enumerate((1 - right_share, right_share)):
            ids = targets.ids.take(upper_left + (row * (width + 2) + column))
            neighbours.append((ids, row_share * column_share))
    if targets.pixels is not None:
        _share_out_ignored(neighbours)
    return neighbours


def _share_out_ignored(neighbours: list[tuple[Tensor, Tensor]]) -> None:
    """Scale the shares around points beside ignored pixels, so that what is not ignored makes up for it."""
    concerned = torch.stack([ids == IGNORED for ids, _ in neighbours]).any(0)
    ids = torch.stack([ids[concerned] for ids, _ in neighbours])
    shares = torch.stack([share[concerned] for _, share in neighbours])
    inside = torch.where(ids != OUTSIDE, shares, 0).sum(0)
    kept = torch.where(ids >= 0, shares, 0).sum(0)
    for row, (_, share) in enumerate(neighbours):
        share[concerned] = shares[row] * (inside / kept)


def _labels(neighbours: list[tuple[Tensor, Tensor]], classes: Tensor) -> Tensor:
    """How much of each of `classes` (N,) is at points whose _neighbours are given: (N, P). Neighbours (P,)
    are those of the same points for all."""
    parts = [torch.where(ids == classes[:, None], share, 0) for ids, share in neighbours]
    return (parts[0] + parts[1]) + (parts[2] + parts[3])


def _framed_index(targets: Targets, images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Where the pixels (row, column), (N, P), of `images` (N,) are in targets.ids; −1 is the frame."""
    _, height, width = targets.ids.shape
    return (images[:, None] * height + row + 1) * width + column + 1


def _sample(maps: Tensor, points: Tensor) -> Tensor:
    """Maps (N, C, h, w) at points (N, P, 2), bilinearly: (N, C, P) in float32 at least."""
    dtype = _wide(maps)
    grid = 2 * points.unsqueeze(2).to(dtype) - 1
    return F.grid_sample(maps.to(dtype), grid, align_corners=False)[..., 0]


# ----------------------------------------------------------------


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _mean_over_ranks(values: list[float], device: torch.device) -> Tensor:
    """The mean over all ranks of each of `values`, or 1 where it is 0 (nothing is there to be divided)."""
    means = torch.tensor(values, dtype=torch.float32, device=device)
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
        dist.all_reduce(means)
        means /= dist.get_world_size()
    return torch.where(means > 0, means, 1)


def _check(output: Mask2FormerOutput, mask: Tensor, num_classes: int, ignore_index: int) -> None:
    batch, _, outcomes = output.classes[-1].shape
    if outcomes != num_classes + 1:
        raise ValueError(
            f"output of a head for {outcomes - 1} classes, num_classes={num_classes}: expected the same"
        )
    if mask.dim() != 3 or mask.shape[0] != batch:
        raise ValueError(f"mask of shape {tuple(mask.shape)}: expected ({batch}, H, W), one id per pixel")
    check_ids(mask, num_classes, ignore_index)


def _check_sampling(points: int, oversample: float, importance: float) -> None:
    if points < 1 or oversample < 1 or not 0 <= importance <= 1:
        raise ValueError(
            f"points={points}, oversample={oversample}, importance={importance}: expected at least 1 point, "
            "an oversampling of at least 1 and a share in [0, 1]"
        )
