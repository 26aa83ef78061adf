"""What is learnt from an evaluation: tables and pictures for people, in the folder `report` of a run."""
