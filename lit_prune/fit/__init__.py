"""A fit: the plan of its cuts, the LightningModule, distillation, the learning rate, sharded weights."""
