"""Networks without a classifier in an audit: heads that give them accuracies, and the images heads are trained on."""
