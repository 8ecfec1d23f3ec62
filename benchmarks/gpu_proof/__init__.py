"""The first minutes on a GPU: what holds, how fast it is and how much memory it takes."""
