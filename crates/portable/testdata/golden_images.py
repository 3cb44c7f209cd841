"""Images at other sizes and places."""

import itertools
import math

import numpy as np

from golden import In, Text, family


def grid(mode, start, end, i, n):
    """Place `i` of `n` between `start` and `end`, by the formulas of `resize_bilinear`."""
    sign = 1 if end >= start else -1
    size = abs(end - start) + 1
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if n == 1:
            p = start if mode[0] == "S" else (start + end) / 2
        else:
            p = start + i * (end - start) / (n - 1)
    elif mode == "DEFAULT":
        p = start + sign * i * ((size - size / n) / (n - 1) if n > 1 else 0)
    elif mode == "OFFSET_CORNERS":
        delta = max(1, abs(end - start)) / n
        p = start + sign * (0.5 * delta + i * delta)
    else:
        p = start + sign * (i * size / n + 0.5 * size / n - 0.5)
    return min(max(p, min(start, end)), max(start, end))


def interpolate(x, axis, places):
    x = np.moveaxis(x, axis, -1)
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, x.shape[-1] - 1)
    part = places - low
    return np.moveaxis(x[..., low] * (1 - part) + x[..., high] * part, -1, axis)


def bilinear(x, size, mode):
    for axis, n in zip((-2, -1), size):
        last = x.shape[axis] - 1
        x = interpolate(x, axis, np.array([grid(mode, 0, last, i, n) for i in range(n)]))
    return x


def nearest(x, size, half_pixel):
    for axis, n in zip((-2, -1), size):
        length = x.shape[axis]
        index = [((2 * i + 1) * length // (2 * n)) if half_pixel else i * length // n for i in range(n)]
        x = np.take(x, index, axis)
    return x


def pixel(plane, y, x, padding, value):
    h, w = plane.shape
    if padding == "constant" and not (0 <= y < h and 0 <= x < w):
        return value
    return plane[min(max(int(y), 0), h - 1), min(max(int(x), 0), w - 1)]


def mirrored(p, low, high):
    if high <= low:
        return max(low, 0)
    span = high - low
    p = abs(p - low)
    turns, rest = divmod(p, span)
    return low + rest if turns % 2 == 0 else high - rest


def brought_in(p, length, padding):
    if padding == "border":
        return min(max(p, 0), length - 1)
    if padding == "reflection":
        return min(max(mirrored(p, 0, length - 1), 0), length - 1)
    if padding == "symmetric":
        return min(max(mirrored(p, -0.5, length - 0.5), 0), length - 1)
    return p


def sample(plane, y, x, sampling, padding, value):
    y, x = brought_in(y, plane.shape[0], padding), brought_in(x, plane.shape[1], padding)
    if sampling == "nearest":
        return pixel(plane, np.round(y), np.round(x), padding, value)
    top, left = math.floor(y), math.floor(x)
    dy, dx = y - top, x - left
    total = 0.0
    for oy, wy in ((0, 1 - dy), (1, dy)):
        for ox, wx in ((0, 1 - dx), (1, dx)):
            if wy * wx > 0:
                total += wy * wx * pixel(plane, top + oy, left + ox, padding, value)
    return total


def to_pixels(p, length, mode, align):
    if mode == "unnormalized":
        return p
    if mode == "normalized_minus_one_to_one":
        p = (p + 1) / 2
    return p * (length - 1) if align else p * length - 0.5


def resample(x, coordinates, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners):
    b, c, h, w = x.shape
    out = np.zeros((b, c) + coordinates.shape[1:3])
    for n, k, i, j in np.ndindex(*out.shape):
        px, py = coordinates[n, i, j]
        px = to_pixels(px, w, coordinates_mode, align_corners)
        py = to_pixels(py, h, coordinates_mode, align_corners)
        out[n, k, i, j] = sample(x[n, k], py, px, sampling_mode, padding_mode, float(padding_value))
    return out


def affine(x, transform_matrix, output_height, output_width, padding_value, **_):
    b, c, h, w = x.shape
    out = np.zeros((b, c, output_height, output_width))
    for n, k, i, j in np.ndindex(*out.shape):
        m = transform_matrix[n if len(transform_matrix) > 1 else 0]
        at = np.array([2 * j / (output_width - 1) - 1, 2 * i / (output_height - 1) - 1, 1])
        px = to_pixels(m[:3] @ at, w, "normalized_minus_one_to_one", True)
        py = to_pixels(m[3:] @ at, h, "normalized_minus_one_to_one", True)
        out[n, k, i, j] = sample(x[n, k], py, px, "bilinear", "constant", float(padding_value))
    return out


def crop_resize(
    x,
    roi=None,
    boxes=None,
    box_indices=None,
    target_height=1,
    target_width=1,
    normalized_coordinates=False,
    spatial_scale=1.0,
    box_coordinate_mode="CORNERS_HEIGHT_FIRST",
    sampling_mode="DEFAULT",
    pad_value=0.0,
):
    b, c, h, w = x.shape
    if roi is not None:
        numbers = roi.reshape(roi.shape[0], -1)
        all_images = numbers.shape[1] == 4
        images = [range(b) if all_images else [int(r[0])] for r in numbers]
        numbers = numbers[:, -4:]
    else:
        numbers = boxes
        images = [[i if box_indices is None else int(box_indices[i])] for i in range(len(boxes))]
    out = []
    for box, which in zip(numbers.astype(float), images):
        box = box * float(spatial_scale)
        if "WIDTH_FIRST" in box_coordinate_mode:
            box = box[[1, 0, 3, 2]]
        if "CENTER" in box_coordinate_mode:
            box = np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])
        if normalized_coordinates:
            box = box * np.array([h - 1, w - 1, h - 1, w - 1])
        for n in which:
            crop = np.zeros((c, target_height, target_width))
            for k, i, j in np.ndindex(*crop.shape):
                y = grid(sampling_mode, box[0], box[2], i, target_height)
                z = grid(sampling_mode, box[1], box[3], j, target_width)
                inside = 0 <= y <= h - 1 and 0 <= z <= w - 1
                crop[k, i, j] = sample(x[n, k], y, z, "bilinear", "border", 0) if inside else float(pad_value)
            out.append(crop)
    out = np.array(out)
    if roi is not None:
        return out.reshape(len(numbers), -1, c, target_height, target_width)
    return out


@family("image_resizing")
def image_resizing(f):
    x = f.normal(1, 2, 3, 5)
    modes = ["STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS"]
    for mode, size in itertools.product(modes, [(7, 4), (1, 9), (3, 5)]):
        f.case(
            "resize_bilinear",
            {"x": In(x), "target_size_height": size[0], "target_size_width": size[1], "sampling_mode": mode},
            lambda x, target_size_height, target_size_width, sampling_mode: bilinear(
                x, (target_size_height, target_size_width), sampling_mode
            ),
            f"{mode} {size}",
            half=size == (7, 4),
        )
        f.case(
            "resize",
            {
                "x": In(x),
                "shape": np.array([9, 9, *size]),
                "resized_dims": Text("uint32(2)"),
                "interpolation_mode": "LINEAR",
                "sampling_mode": mode,
            },
            lambda x, shape, sampling_mode, **_: bilinear(x, [int(s) for s in shape[2:]], sampling_mode),
            f"{mode} {size}",
            half=False,
        )
    f.case(
        "resize",
        {"x": In(x), "shape": np.array([0, 4]), "resized_dims": Text("uint32(2)")},
        lambda x, **_: bilinear(x, (3, 4), "DEFAULT"),
        "a kept dimension",
    )
    f.case(
        "resize",
        {"x": In(x), "shape": np.array([8]), "resized_dims": Text("uint32(1)")},
        lambda x, **_: interpolate(x, -1, np.array([grid("DEFAULT", 0, 4, i, 8) for i in range(8)])),
        "one dimension",
    )
    f.case(
        "resize",
        {
            "x": In(f.integers(-9, 9, 1, 1, 2, 3)),
            "shape": np.array([5, 6]),
            "resized_dims": Text("uint32(2)"),
            "interpolation_mode": "NEAREST_NEIGHBOR",
        },
        lambda x, **_: nearest(x, (5, 6), True),
        "nearest of integers",
    )
    for size in [(7, 4), (6, 10), (2, 2)]:
        f.case(
            "resize_nearest_neighbor",
            {"x": In(x), "target_size_height": size[0], "target_size_width": size[1]},
            lambda x, target_size_height, target_size_width: nearest(x, (target_size_height, target_size_width), True),
            str(size),
        )
    for h, w in [(2, 3), (1.0, 2.5), (0.5, 1.5)]:
        size = (math.floor(3 * h), math.floor(5 * w))
        f.case(
            "upsample_nearest_neighbor",
            {"x": In(x), "scale_factor_height": h, "scale_factor_width": w},
            lambda x, size=size, **_: nearest(x, size, False),
            f"{h} {w}",
        )
        for align in (True, False):
            mode = "STRICT_ALIGN_CORNERS" if align else "UNALIGN_CORNERS"
            f.case(
                "upsample_bilinear",
                {"x": In(x), "scale_factor_height": h, "scale_factor_width": w, "align_corners": align},
                lambda x, size=size, mode=mode, **_: bilinear(x, size, mode),
                f"{h} {w} align {align}",
            )
    f.case(
        "upsample_bilinear",
        {
            "x": In(x),
            "scale_factor_height": 2,
            "scale_factor_width": 3,
            "align_corners": False,
            "half_pixel_centers": False,
        },
        lambda x, **_: bilinear(x, (6, 15), "DEFAULT"),
        "neither aligned nor half",
    )
    f.case(
        "crop",
        {"x": In(x), "crop_height": np.array([1, 1]), "crop_width": np.array([0, 2])},
        lambda x, **_: x[:, :, 1:2, 0:3],
    )
    x = f.normal(2, 2, 4, 5)
    places = f.uniform(-1.4, 1.4, 2, 3, 4, 2)
    for sampling, padding, align in itertools.product(
        ["bilinear", "nearest"], ["constant", "border", "reflection", "symmetric"], [True, False]
    ):
        for mode, scale, shift in [
            ("normalized_minus_one_to_one", 1, 0),
            ("normalized_zero_to_one", 0.5, 0.5),
            ("unnormalized", 4, 2),
        ]:
            f.case(
                "resample",
                {
                    "x": In(x),
                    "coordinates": In(places * scale + shift),
                    "sampling_mode": sampling,
                    "padding_mode": padding,
                    "padding_value": 0.5,
                    "coordinates_mode": mode,
                    "align_corners": align,
                },
                resample,
                f"{sampling} {padding} {mode} {align}",
                half=False,
            )
    f.case(
        "resample",
        {
            "x": In(x),
            "coordinates": In(f.integers(-2, 7, 2, 3, 4, 2)),
            "sampling_mode": "bilinear",
            "padding_mode": "constant",
            "padding_value": 6.0,
            "coordinates_mode": "unnormalized",
            "align_corners": True,
        },
        resample,
        "integer coordinates",
    )
    for matrices in (1, 2):
        f.case(
            "affine",
            {
                "x": In(x),
                "transform_matrix": In(np.round(f.normal(matrices, 6) * 8) / 8),
                "output_height": 3,
                "output_width": 6,
                "sampling_mode": "bilinear",
                "padding_mode": "constant",
                "padding_value": 0.0,
                "coordinates_mode": "normalized_minus_one_to_one",
                "align_corners": True,
            },
            affine,
            f"{matrices} matrices",
            half=False,
        )
    boxes = np.array([[0.25, 0.5, 2.5, 3.25], [1.0, 1.0, 5.0, 6.0], [2.0, 3.0, 0.5, 1.0]], np.float32)
    for mode, corner in itertools.product(
        modes, ["CORNERS_HEIGHT_FIRST", "CORNERS_WIDTH_FIRST", "CENTER_SIZE_HEIGHT_FIRST", "CENTER_SIZE_WIDTH_FIRST"]
    ):
        f.case(
            "crop_resize",
            {
                "x": In(x),
                "boxes": In(boxes),
                "box_indices": In(np.array([0, 1, 0], np.int32)),
                "target_height": 2,
                "target_width": 3,
                "box_coordinate_mode": corner,
                "sampling_mode": mode,
                "pad_value": -1.0,
            },
            crop_resize,
            f"{mode} {corner}",
            half=False,
        )
    f.case(
        "crop_resize",
        {
            "x": In(x),
            "roi": In(boxes.reshape(3, 1, 4, 1, 1)),
            "target_height": 3,
            "target_width": 2,
            "spatial_scale": np.float32(0.5),
            "sampling_mode": "ALIGN_CORNERS",
        },
        crop_resize,
        "boxes of every image",
        opset="ios15",
        half=False,
    )
    indexed = np.concatenate([np.array([[1], [0], [1]], np.float32), boxes / 8], axis=1)
    f.case(
        "crop_resize",
        {
            "x": In(x),
            "roi": In(indexed.reshape(3, 1, 5, 1, 1)),
            "target_height": 2,
            "target_width": 2,
            "normalized_coordinates": True,
            "sampling_mode": "ALIGN_CORNERS",
        },
        crop_resize,
        "boxes that name their image",
        opset="ios16",
        half=False,
    )
