"""A fit: its plan of cuts, the LightningModule, the teacher, the learning rate, sharded weights."""
