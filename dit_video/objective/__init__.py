"""What the network learns: the path from clean to noise, noise levels, tasks and losses. Receives the network as a callable."""
