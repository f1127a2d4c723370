"""The table and the picture of tests/experiment.py say what the runs said."""

from xml.etree import ElementTree

from tests.experiment import Speed, picture, table


def result(nats: float, margin: float) -> dict:
    swap = {"accuracy": 0.5 + margin, "margin": margin}
    held = {"nats_per_frame": nats, "nats_per_codebook": [nats / 4, 3 * nats / 4]}
    return {"parameters": 1500000, "held_out": held, "acoustic_consistency": swap}


RESULTS = {
    "flat": [result(6.0, 0.1), result(7.0, 0.3)],
    "hierarchical": [result(5.0, 0.0), result(5.0, 0.0)],
}


def test_the_table_gives_means_and_standard_deviations():
    text = table(RESULTS, dict.fromkeys(RESULTS, Speed(63.2, 12.3, 4.56)))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert len({len(row) for row in rows}) == 1
    assert rows[2][:7] == [
        "flat",
        "1.50M",
        "63",
        "6.50 ± 0.71",
        "1.62 4.88",
        "70 ± 14",
        "0.200 ± 0.141",
    ]
    assert rows[2][7:] == ["12 x", "4.6 ms"] and "counting" not in text


def test_the_picture_has_a_dot_for_every_run():
    svg = ElementTree.fromstring(picture(RESULTS))
    circles = [e for e in svg.iter() if e.tag.endswith("circle")]
    assert len(circles) == 4 + len(RESULTS)  # and the legend
    x = [float(c.get("cx")) for c in circles[:4]]
    y = [float(c.get("cy")) for c in circles[:4]]
    assert x[2] == x[3] < x[0] < x[1] and y[2] == y[3] > y[0] > y[1]
