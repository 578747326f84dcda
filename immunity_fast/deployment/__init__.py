"""What is done with a trained model: loaded, explained, exported, described."""
