"""The paper's story and its comparison of systems, trained and scored on one machine."""
