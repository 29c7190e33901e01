"""Reports: tables, the written report of a study, and the card of a saved model."""
