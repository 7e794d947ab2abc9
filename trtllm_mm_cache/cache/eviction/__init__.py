"""In which order entries leave a cache when room is needed."""
