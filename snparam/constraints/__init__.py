"""From a weight and its estimate to the weight in use. Knows no modules."""
