"""Every kernel compiled without a GPU, and what its compiler says of registers, spills and shared memory."""
