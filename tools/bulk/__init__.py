"""Bulk prediction, behind `classer predict`: files of any size, formats, continued runs, Apache Beam."""
