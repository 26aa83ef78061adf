"""From a data set to batches: in any order and from any position of a training, or as a stream."""
