"""Adapters made into ordinary weights, with the difference measured."""
