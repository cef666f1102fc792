"""The book's own studies: what stands above single techniques, one file a study."""
