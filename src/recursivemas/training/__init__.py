"""Training of links. Agents are frozen: their weights are, bit by bit, the same afterwards."""
