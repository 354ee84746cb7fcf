"""Flower's FedAvg with metabloom's MAML clients."""
