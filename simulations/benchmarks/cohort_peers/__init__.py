"""Other people's ways to train the clients of a round, each a program of its own, and ours."""
