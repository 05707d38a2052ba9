"""Student, teacher and losses as one of timm's training tasks."""
