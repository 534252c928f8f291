"""Training and evaluation on images, as timm's own scripts do them."""
