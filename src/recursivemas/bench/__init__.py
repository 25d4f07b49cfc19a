"""What a latent step, a round, a text hand-off cost: measured beside what else could have been done, in one run."""
