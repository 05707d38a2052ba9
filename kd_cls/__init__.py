"""The timm counterpart."""
