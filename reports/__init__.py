"""Reports of evaluations: tables and pictures, in the folder `report` of a run."""
