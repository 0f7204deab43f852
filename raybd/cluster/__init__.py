"""Everything that needs Ray: pretraining on workers, the search over trials, the session."""
