"""Flash attention on TPUs in Pallas Mosaic."""
