"""Images from folders and tar files, in an order that depends on the seed and the step alone."""

from zoo.data.images import decode_image
from zoo.data.opening import Data, open_data
from zoo.data.order import StepSampler
from zoo.data.samples import Batch, Samples, batches_of, evaluation_transform, loader, training_transform
from zoo.data.sources import ImageTree, Source
from zoo.data.tars import TarShards, validation_labels
from zoo.data.verify import verify

__all__ = [
    "Batch",
    "Data",
    "ImageTree",
    "Samples",
    "Source",
    "StepSampler",
    "TarShards",
    "batches_of",
    "decode_image",
    "evaluation_transform",
    "loader",
    "open_data",
    "training_transform",
    "validation_labels",
    "verify",
]
