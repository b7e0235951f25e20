"""Training data: sources list documents, the stream orders and tokenizes them, the loader cuts samples for one rank."""
