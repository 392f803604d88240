"""What makes the embedded models, and the training that real models share with them."""
